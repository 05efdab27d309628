"""The defaults of a run: those of Qwen's launch scripts, the same for finetune.py, launchers and preview."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import preview_data
from tests.commands import run_here
from tests.models import TINY
from training.config.parsing import parse_args
from training.training_arguments import build_training_arguments

COMMON = {
    "num_train_epochs": 5, "per_device_eval_batch_size": 1, "weight_decay": 0.1, "adam_beta2": 0.95,
    "warmup_steps": 0.01, "lr_scheduler_type": "cosine", "save_strategy": "steps", "save_steps": 1000,
    "save_total_limit": 10, "gradient_checkpointing": True, "report_to": [],
}  # fmt: skip
MODES = {
    "": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16, "learning_rate": 1e-5},
    "--use_lora": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "learning_rate": 3e-4},
}


@pytest.mark.parametrize("mode", MODES)
def test_a_run_has_the_values_of_the_original_scripts(mode: str) -> None:
    args = parse_args(mode.split())
    training = build_training_arguments(args)
    for name, value in (COMMON | MODES[mode]).items():
        assert getattr(training, name) == value, name
        assert args.to_dict()[name] == (value if name != "report_to" else "none"), name
    assert args.data.model_max_length == 2048


def test_given_values_take_precedence() -> None:
    flags = "--use_lora --num_train_epochs 1 --gradient_checkpointing False --warmup_ratio 0.5 --save_strategy no"
    training = build_training_arguments(parse_args(flags.split()))
    values = (training.num_train_epochs, training.gradient_checkpointing, training.warmup_steps, training.learning_rate)
    assert values == (1, False, 0.5, 3e-4)
    assert training.save_strategy == "no"


def test_help_shows_both_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: 1e-05; with --use_lora: 0.0003)" in text
    assert "(default: 16; with --use_lora: 8)" in text


def test_preview_shows_the_steps_of_a_run_without_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "a.jsonl"
    data.write_text('{"prompt": "Hi", "response": "Hello"}\n' * 64)
    arguments = ["--model_name_or_path", TINY, "--data_path", data, "--disable_tqdm", "True"]
    assert run_here(preview_data.main, "preview_data", [*arguments, "--use_lora"]) == 1  # all samples are identical
    text = " ".join(capsys.readouterr().out.split())
    assert "20 in total (5 epochs), 4 per epoch. A step uses 16 samples: 2 per device x 8 accumulation steps" in text
    assert "--model_max_length 2048" in text
