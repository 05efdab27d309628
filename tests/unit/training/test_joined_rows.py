"""Micro-batches that are joined to longer rows: the same optimizer steps, in fewer forward and backward passes."""

from __future__ import annotations

import json
import logging
import random
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_utils.collate import Collator
from tests.commands import Recorder, finetune_here
from tests.golden import relative_difference
from tests.models import CONVERSATIONS, TINY, write_conversations, write_later_checkpoint
from training.build import _joins_rows
from training.config.parsing import parse_args
from training.joined_rows import is_empty, join, join_micro_batches
from training.rows import why_apart
from training.trainer import QwenTrainer

COLLATE = Collator(0, is_padded=False)


def example(length: int, **values: Any) -> Any:
    ids = torch.randint(1, 9, (length,)).tolist()
    return {"input_ids": ids, "labels": [-100 if token < 3 else token for token in ids], **values}


def test_a_joined_row_is_the_row_that_the_collator_makes_of_all_samples() -> None:
    chosen = random.Random(0)
    for _ in range(20):
        items: list[Any] = []
        for index in range(chosen.randint(2, 8)):
            length = chosen.randint(1, 9)
            values: dict[str, Any] = {"loss_weights": [0.5] * length} if chosen.random() < 0.3 else {}
            items.append(example(length, **values, **({"index": index} if chosen.random() < 0.7 else {})))
        items.append([example(2), example(3, index=99)])  # a pack
        first, second = sorted(chosen.sample(range(1, len(items)), min(2, len(items) - 1))) if items[2:] else (1, 1)
        parts = [part for part in (items[:first], items[first:second], items[second:]) if part]
        row, expected = join([COLLATE(part) for part in parts]), COLLATE(items)
        assert row.keys() == expected.keys()
        for name, value in expected.items():
            if isinstance(value, Tensor):
                assert row[name].dtype == value.dtype and torch.equal(row[name], value), name
            else:
                assert row[name] == value, name


def test_micro_batches_are_joined_in_order_up_to_the_budget_and_free_places_come_first() -> None:
    batches = [COLLATE([example(length, index=length)]) for length in (3, 4, 2, 9, 1, 1)]
    joined = join_micro_batches(batches, 9)
    assert [is_empty(batch) for batch in joined] == [True] * 3 + [False] * 3
    assert [batch["sequence_lengths"] for batch in joined[3:]] == [(3, 4, 2), (9,), (1, 1)]
    assert joined[3]["index"] == [3, 4, 2] and joined[4] is batches[3]
    assert all(one is other for one, other in zip(join_micro_batches(batches, 4)[2:], batches[1:4], strict=False))


def train(
    monkeypatch: pytest.MonkeyPatch, model: Path, data: Path, output: Path, *flags: object
) -> tuple[Recorder, list[int]]:
    """Train with SGD and without clipping; also return the positions of all forward passes."""
    positions: list[int] = []
    compute = QwenTrainer.compute_loss

    def record(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        positions.append(inputs["input_ids"].numel())
        return compute(self, model, inputs, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(QwenTrainer, "compute_loss", record)
        run = finetune_here(
            "--model_name_or_path", model, "--data_path", data, "--output_dir", output, "--optim", "sgd",
            "--learning_rate", 0.01, "--max_grad_norm", 0, "--logging_steps", 1, "--save_strategy", "no",
            "--include_num_input_tokens_seen", "all", *flags,
        )  # fmt: skip
    return run, positions


def weighted(path: Path) -> Path:
    """Write eleven conversations, one of them long, some with weights of their own."""
    conversations = [*CONVERSATIONS, CONVERSATIONS[3] * 3, *CONVERSATIONS[:2]]
    records = json.loads(write_conversations(path, conversations).read_text(encoding="utf-8"))
    for record, weight in zip(records, cycle([0.5, None, 3]), strict=False):
        if weight:
            record["conversations"][1]["weight"] = weight
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


@pytest.mark.parametrize(("model_type", "size"), [("qwen", 1), ("qwen2", 2)])
def test_joined_steps_have_the_gradients_and_the_counts_of_separate_micro_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, size: int
) -> None:
    """The last step of each of the two epochs has fewer micro-batches."""
    model = TINY if model_type == "qwen" else write_later_checkpoint(tmp_path / "model", model_type)
    data = weighted(tmp_path / "train.json")
    flags = (
        "--per_device_train_batch_size", size, "--gradient_accumulation_steps", 4,
        *(("--use_lora", "--lora_dropout", 0, "--lora_r", 4) if size == 1 else ()), "--num_train_epochs", 2,
    )  # fmt: skip
    apart, separate = train(monkeypatch, model, data, tmp_path / "apart", *flags, "--join_micro_batches", False)
    joined, rows = train(monkeypatch, model, data, tmp_path / "joined", *flags)
    assert len(rows) < len(separate) and sum(rows) == sum(separate) and max(rows) <= 2 * max(separate)
    assert joined.losses() == pytest.approx(apart.losses(), rel=1e-5)
    for step, (ours, theirs) in enumerate(zip(joined.gradients, apart.gradients, strict=True)):
        assert ours.keys() == theirs.keys()
        for name, gradient in ours.items():
            assert relative_difference(gradient, theirs[name]) < (1e-6 if step == 0 else 1e-4), name
    for name in ("step", "epoch", "tokens", "samples", "padding"):
        assert [row.get(name) for row in joined.rows] == [row.get(name) for row in apart.rows]
    for name in ("global_step", "epoch", "num_input_tokens_seen", "total_flos"):
        assert getattr(joined.trainer_state, name) == getattr(apart.trainer_state, name), name
    assert joined.trainer_state.num_input_tokens_seen == sum(separate)


def test_where_nothing_fits_together_no_bit_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_conversations(tmp_path / "train.json", CONVERSATIONS[:1] * 6)
    flags = ("--use_lora", "--lora_dropout", 0.3, "--gradient_accumulation_steps", 3, "--num_train_epochs", 1)
    apart, separate = train(monkeypatch, TINY, data, tmp_path / "apart", *flags, "--join_micro_batches", False)
    joined, rows = train(monkeypatch, TINY, data, tmp_path / "joined", *flags)
    assert rows == separate
    for ours, theirs in zip(joined.gradients, apart.gradients, strict=True):
        assert all(torch.equal(gradient, theirs[name]) for name, gradient in ours.items())


@pytest.mark.parametrize(
    ("flags", "processes", "reason"),
    [
        ("", 1, ""),
        ("", 2, ""),
        ("--join_micro_batches False", 1, "--join_micro_batches False"),
        ("--deepspeed finetune/ds_config_zero2.json", 2, "with DeepSpeed ZeRO-2 every rank"),
        ("--fsdp True --fsdp_config finetune/fsdp_config.json", 2, "with FSDP2 every rank"),
    ],
)
def test_engines_that_communicate_in_every_pass_join_nothing_and_the_log_says_why(
    flags: str, processes: int, reason: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    args = parse_args([*flags.split(), "--gradient_accumulation_steps", "2"])
    assert why_apart(args).startswith(reason) and bool(reason) == bool(why_apart(args))
    with caplog.at_level(logging.INFO, "training"):
        assert _joins_rows(args) == (not reason)
    assert [f"Micro-batches are not joined: {reason}" in text for text in caplog.messages] == [True] * (
        "with" in reason
    )
