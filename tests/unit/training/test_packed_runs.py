"""Runs on packed samples: the same step as without packing, complete epochs, and counts of samples."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from data_utils.report.data_report import count_steps
from errors import RunError
from tests.commands import finetune_here, read_json, read_log
from tests.models import CONVERSATIONS, TINY, write_later_checkpoint
from tests.unit.training.test_trainer import build_trainer, logs_of
from training.config.parsing import parse_args
from training.data import preview_data
from training.rows import choose_packing
from training.samplers import PackedExamples
from training.summary import warn_of_few_steps
from training.trainer import QwenTrainer

ONE_STEP = (
    "--num_train_epochs", 1, "--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 8,
    "--max_grad_norm", 0,
)  # fmt: skip
PACKED = ("--packing", "--model_max_length", 80)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations of which every third has answers of another weight, and a text."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    lines = []
    for number, turns in enumerate(CONVERSATIONS):
        weight = {"weight": 0.5} if number % 3 == 0 else {}
        entries = [
            {"from": author, "value": text, **(weight if author == "assistant" else {})} for author, text in turns
        ]
        lines.append(json.dumps({"conversations": entries}))
    path.write_text("\n".join(lines))
    return path


def packs_of(trainer: QwenTrainer) -> list[list[int]]:
    packs: Any = trainer.train_dataset
    assert isinstance(packs, PackedExamples)
    return [[example["index"] for example in packs[index]] for index in range(len(packs))]


class Gradients(TrainerCallback):
    """Keeps the gradients of the last optimizer step."""

    def __init__(self) -> None:
        self.values: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, *args: Any, model: Any, **kwargs: Any) -> None:
        self.values = {name: tensor.grad.clone() for name, tensor in model.named_parameters()}


@pytest.mark.parametrize(("model_type", "samples"), [("qwen", 8), ("qwen3_5_text", 11)])
def test_a_packed_epoch_is_the_step_of_an_unpacked_one(
    data: Path, tmp_path: Path, model_type: str, samples: int, request: pytest.FixtureRequest
) -> None:
    """One optimizer step of an epoch: loss, counts, gradients and the evaluation are the same.

    Qwen3.6 trains a chat of two questions as two samples, one of three as three.
    """
    model, one_step = TINY, (*ONE_STEP, "--gradient_accumulation_steps", samples)
    if model_type != "qwen":
        template = request.getfixturevalue("shared") / "families" / "templates" / "qwen3_6.jinja"
        model = write_later_checkpoint(tmp_path / "model", model_type, template.read_text(encoding="utf-8"))
    evaluate = ("--eval_data_path", data, "--per_device_eval_batch_size", 3)
    plain = build_trainer(data, tmp_path / "1", "--model_max_length", 80, *one_step, model=model)
    packed = build_trainer(data, tmp_path / "2", *PACKED, *one_step, *evaluate, model=model)
    assert 1 < len(packs_of(packed)) < samples
    gradients = [Gradients(), Gradients()]
    for trainer, each in zip((plain, packed), gradients, strict=True):
        trainer.add_callback(each)
        trainer.train()
    [one], [other] = logs_of(plain), logs_of(packed)
    assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert other["token_accuracy"] == one["token_accuracy"]
    for name in ("targets", "tokens", "samples", "steps"):
        assert getattr(packed.progress.total, name) == getattr(plain.progress.total, name), name
    assert packed.progress.total.samples == samples
    for name, expected in gradients[0].values.items():
        assert (gradients[1].values[name] - expected).norm() <= 1e-5 * expected.norm() > 0, name
    losses = [trainer.evaluate(packed.eval_dataset)["eval_loss"] for trainer in (packed, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_every_epoch_has_every_sample_once_in_another_order_of_the_same_packs(data: Path, tmp_path: Path) -> None:
    flags = ("--train_sampling_strategy", "random", "--num_train_epochs", 3, "--per_device_train_batch_size", 2)
    trainer = build_trainer(data, tmp_path, *PACKED, *flags)
    seen: list[list[int]] = []
    collate: Any = trainer.data_collator

    def record(items: Any) -> Any:
        seen.extend([example["index"] for example in item] for item in items)
        return collate(items)

    trainer.data_collator = record
    trainer.train()
    packs = packs_of(trainer)
    epochs = [seen[start : start + len(packs)] for start in range(0, len(seen), len(packs))]
    assert len(epochs) == 3 and all(sorted(epoch) == sorted(packs) for epoch in epochs)
    assert epochs[0] != epochs[1] or epochs[1] != epochs[2]
    assert trainer.state.max_steps == 3 * math.ceil(len(packs) / 2) and trainer.progress.total.samples == 24


def test_a_divergence_names_the_samples_of_the_pack_once(data: Path, tmp_path: Path) -> None:
    flags = ("--data_path", f"{data}@x2", "--model_max_length", 200, "--per_device_train_batch_size", 1)
    trainer = build_trainer(data, tmp_path, *PACKED, *flags, "--max_steps", 1)
    model: Any = trainer.model
    with torch.no_grad():
        model.transformer.wte.weight.fill_(math.nan)
    with pytest.raises(RunError) as stopped:
        trainer.train()
    places = dict.fromkeys(f"{data}:{index // 2 + 1}" for index in packs_of(trainer)[0])
    assert f"its samples: {', '.join(places)}. Check" in str(stopped.value)
    assert len(packs_of(trainer)[0]) > len(places)


def test_texts_are_packed_with_conversations_and_each_keeps_its_way(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """``--packing auto`` packs because of the text; the log, the receipt and the summary say so."""
    text = tmp_path / "a.txt"
    text.write_text("Once there was a small model, and it read a text. " * 6)
    trainer = build_trainer(data, tmp_path / "1", "--data_path", data, text, "--model_max_length", 80)
    examples: Any = trainer.train_dataset
    assert isinstance(examples, PackedExamples) and examples.examples.has_text
    for index, example in enumerate(examples.examples):
        is_text = examples.where(index).startswith(str(text))
        trained = [label for label in example["labels"][1:] if label >= 0]
        assert (len(trained) == len(example["labels"]) - 1) == is_text
    finetune_here(
        "--model_name_or_path", TINY, "--data_path", data, text, "--output_dir", tmp_path / "out", "--use_cpu", "True",
        "--model_max_length", 80, "--num_train_epochs", 1, "--data_mixing", "sequential",
        "--per_device_train_batch_size", 1,
    )  # fmt: skip
    receipt, summary = (read_json(tmp_path / "out" / name) for name in ("data_receipt.json", "run_summary.json"))
    packing, start = receipt["train"]["packing"], capfd.readouterr().err
    assert (
        f"  {packing['packs']} packs of up to 80 tokens, {packing['fill']:.1%} filled (--packing auto: there" in start
    )
    assert "--per_device_train_batch_size 1: 80 tokens; about" in start
    assert "of 1 pack (" in start and "optimizer steps, of 1 pack each" in start
    assert summary["steps"] == packing["packs"] == receipt["train"]["steps"]
    samples = receipt["train"]["samples"]
    assert summary["trained_samples"] == samples == read_log(tmp_path / "out")[-1]["samples"] > receipt["train"]["kept"]
    kept = read_json(tmp_path / "out" / "training_samples.json")["samples"]
    assert any(sample["source"].startswith(str(text)) for sample in kept)


@pytest.mark.parametrize(
    ("flags", "packing"),
    [
        ([], None), (["--packing"], True), (["--packing", "false"], False), (["--padding_free", "false"], False),
        (["--train_sampling_strategy", "group_by_length"], False),
    ],
)  # fmt: skip
def test_packing_is_left_to_the_data_where_nothing_prevents_it(flags: list[str], packing: bool | None) -> None:
    assert choose_packing(parse_args(flags), {"model_type": "qwen"}) is packing


@pytest.mark.parametrize("packing", [(), ("--packing",)])
def test_tokens_seen_are_those_of_the_samples_also_the_end_of_text(tmp_path: Path, packing: tuple[str, ...]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "a b c" * number}) + "\n" for number in range(1, 5)))
    trainer = build_trainer(
        path, tmp_path / "out", "--include_num_input_tokens_seen", "non_padding", "--num_train_epochs", 1,
        "--packing", bool(packing), *PACKED[1:],
    )  # fmt: skip
    trainer.train()
    examples: Any = trainer.train_dataset
    assert trainer.state.num_input_tokens_seen == trainer.progress.total.tokens > 4
    assert trainer.progress.total.samples == 4 and len(examples) == (1 if packing else 4)


@pytest.mark.parametrize("kind", ["text", "conversations"])
def test_flags_that_concern_no_text_are_logged_once(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.jsonl"
    turns = [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]
    path.write_text(json.dumps({"text": "a b"} if kind == "text" else {"conversations": turns}) + "\n")
    argv = ["--model_name_or_path", TINY, "--data_path", path, "--label_mask", "last", "--system_message", "Be brief."]
    reports = preview_data(parse_args([*map(str, argv), "--padding_free", "false", "--dry_run"]))
    told = [message for message in caplog.messages if "no effect" in message]
    flags = "--system_message Be brief., --label_mask last"
    expected = f"All data is plain text, on which these flags have no effect: {flags}"
    assert told == ([expected] if kind == "text" else [])
    reason = "Off, though there is plain text: batches are padded: --padding_free False"
    assert reports["train"].describe_packing() == (reason if kind == "text" else "")


def test_a_single_step_of_warm_up_is_warned_about_with_possible_advice(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = build_trainer(
        data, tmp_path, "--packing", "--model_max_length", 500, "--per_device_train_batch_size", 1,
        "--num_train_epochs", 1, "--lr_scheduler_type", "cosine", "--warmup_steps", 0.01,
    )  # fmt: skip
    assert len(packs_of(trainer)) == 1
    warn_of_few_steps(trainer)
    few, zero = caplog.messages[::-1][:2]
    assert zero.startswith("The only optimizer step has the learning rate 0, with which --warmup_steps 0.01 begins")
    assert few.endswith("Lower --model_max_length 500, or raise --num_train_epochs 1; docs/training.md has a recipe")


def test_a_run_drops_as_many_packs_as_its_steps_say(data: Path, tmp_path: Path) -> None:
    trainer = build_trainer(
        data, tmp_path, *PACKED, "--per_device_train_batch_size", 2, "--dataloader_drop_last", "True",
        "--num_train_epochs", 2,
    )  # fmt: skip
    expected = count_steps(len(packs_of(trainer)), 2, 2, -1, drop_last=True)
    trainer.train()
    assert trainer.state.global_step == expected[1] == 2 * (len(packs_of(trainer)) // 2)
