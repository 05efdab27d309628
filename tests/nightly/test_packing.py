"""A real model learns a text and conversations in one packed run, which auto packing makes because of the text."""

from __future__ import annotations

from pathlib import Path

from tests.commands import read_json, read_log
from tests.golden import REPO
from tests.nightly.training import behaviour, tune


def test_text_and_conversations_are_learnt_in_one_packed_run(small_model: Path, identity: Path, tmp_path: Path) -> None:
    text = tmp_path / "guide.txt"
    text.write_text((REPO / "docs" / "resuming.md").read_text(encoding="utf-8"), encoding="utf-8")
    output = tune(
        small_model, identity, tmp_path / "adapter", "--use_lora", "--lora_r", 16, "--lora_alpha", 32,
        "--learning_rate", 1e-3, "--data_path", f"{text}@x2", identity, "--model_max_length", 512, "--max_steps", 16,
        "--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 1, "--eval_data_path", text,
        "--eval_on_start", "True", "--eval_strategy", "steps", "--eval_steps", 16, "--save_strategy", "no",
    )  # fmt: skip
    first, *_, last = [row["eval_loss"] for row in read_log(output) if "eval_loss" in row]
    assert last < first - 0.5
    packing = read_json(output / "data_receipt.json")["train"]["packing"]
    assert packing["fill"] > 0.9 and packing["capacity"] == 512
    before, after = (behaviour(small_model, identity, adapter, count=8) for adapter in (None, output))
    assert after.loss < before.loss - 0.5
