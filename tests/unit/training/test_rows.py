"""Runs on rows without padding: the figures of padded batches, and what is padded, with the reason."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from checkpoints.files import load_json
from loading.checkpoint import load_checkpoint
from tests.models import TINY, write_conversations, write_later_checkpoint
from tests.unit.training.test_trainer import build_trainer
from training.config.parsing import parse_args
from training.data import build_collator
from training.rows import why_padded


@pytest.mark.parametrize(
    ("model_type", "flags"),
    [
        ("qwen", ("--use_lora", "--lora_dropout", 0)),
        ("qwen2", ("--label_smoothing_factor", 0.1, "--gradient_checkpointing", "True")),
        ("qwen3", ("--loss", "full_logits", "--attn_implementation", "eager")),
        ("qwen3_5_text", ("--use_lora", "--gradient_checkpointing", "True", "--lora_dropout", 0)),
    ],
)
def test_training_and_evaluation_on_rows_log_the_figures_of_padded_batches(
    tmp_path: Path, model_type: str, flags: tuple[object, ...]
) -> None:
    model = TINY if model_type == "qwen" else write_later_checkpoint(tmp_path / "model", model_type)
    data = write_conversations(tmp_path / "train.json")
    runs = []
    for padding_free in (False, True):
        trainer = build_trainer(
            data, tmp_path / "out", "--eval_data_path", data, "--eval_strategy", "epoch", "--num_train_epochs", 2,
            "--per_device_train_batch_size", 3, "--per_device_eval_batch_size", 3, "--learning_rate", 0.05,
            "--padding_free", padding_free, *flags, model=model,
        )  # fmt: skip
        trainer.train()
        runs.append([row for row in trainer.state.log_history if row.keys() & {"loss", "eval_loss"}])
    padded, flat = runs
    assert len(flat) == len(padded) == 8
    for row, expected in zip(flat, padded, strict=True):
        names = expected.keys() & {"loss", "grad_norm", "token_accuracy", "eval_loss", "eval_token_accuracy"}
        assert {name: row[name] for name in names} == pytest.approx({name: expected[name] for name in names}, rel=1e-4)
    assert {row["padding"] for row in flat if "loss" in row} == {0}
    assert any(row["padding"] > 0 for row in padded if "loss" in row)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--padding_free False", "--padding_free False"),
        ("--attn_implementation flex_attention", "--attn_implementation flex_attention does not keep"),
        ("--torch_compile True", "--torch_compile True would compile anew"),
        ("--torch_compile_backend eager", "--torch_compile_backend eager would"),
    ],
)
def test_what_cannot_be_a_row_is_padded_and_the_log_says_why(
    flags: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    args, checkpoint = parse_args(flags.split()), load_checkpoint(str(TINY))
    assert why_padded(args, checkpoint.config.to_dict()).startswith(reason)
    with caplog.at_level(logging.INFO):
        assert build_collator(args, checkpoint).is_padded
    messages = [record.getMessage() for record in caplog.records if "padded" in record.getMessage()]
    assert [f"Batches are padded: {reason}" in message for message in messages] == [True][: flags[:6] != "--padd"]


def test_attention_decides_whether_batches_are_rows() -> None:
    config: dict[str, Any] = load_json(TINY / "config.json")
    assert why_padded(parse_args([]), config) == ""
    assert why_padded(parse_args(["--attn_implementation", "flash_attention_2"]), config) == ""
    assert "output_attentions" in why_padded(parse_args([]), config | {"output_attentions": True})
