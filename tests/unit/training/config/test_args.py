"""The arguments of a run as data, and their record."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from pathlib import Path

import pytest

from tests.commands import finetune_here
from tests.models import TINY, write_conversations
from training.config.parsing import parse_args
from training.run_folder.start import resumed_checkpoint


def test_arguments_are_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """After parsing they need no file, no environment variable and no other process."""
    args = parse_args(["--output_dir", "~/out", "--q_lora", "--resume_from_checkpoint", "auto"])
    assert args.output_dir == Path.home() / "out"

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(args)

    class Forbidden(dict[str, str]):
        __getitem__ = __contains__ = get = refuse  # type: ignore[assignment]

    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", Forbidden())
        for module, name in (("builtins", "open"), ("io", "open"), ("os", "open"), ("os", "stat"), ("os", "scandir")):
            patch.setattr(f"{module}.{name}", refuse)
        values = (args.output_dir, args.resume, args.resumes_automatically, args.lora.quantization, args.to_dict())
        rates = (args.trainer_value("learning_rate"), args.trainer_values().learning_rate)
    assert values[1:3] == ("auto", True) and rates == (1e-5, 1e-5)
    for target in (args, args.model, args.data, args.lora, args.options):
        with pytest.raises(dataclasses.FrozenInstanceError):
            target.dry_run = True  # type: ignore[attr-defined, misc, union-attr]


def test_a_run_does_not_change_its_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def keep(argv: list[str]) -> object:
        seen.append(parse_args(argv))
        seen.append(copy.deepcopy(seen[0].to_dict()))
        return seen[0]

    monkeypatch.setattr("finetune.parse_args", keep)
    data = write_conversations(tmp_path / "train.json")
    finetune_here(
        "--model_name_or_path", TINY, "--data_path", data, "--eval_data_path", data, "--output_dir", tmp_path / "out",
        "--use_lora", "--max_steps", 2, "--eval_strategy", "steps", "--eval_steps", 1, "--gradient_checkpointing",
        "--save_strategy", "no",
    )  # fmt: skip
    args, before = seen
    assert args.to_dict() == before
    assert args.lora.lora_target_modules is None
    assert json.loads((tmp_path / "out" / "run_args.json").read_text()) == before


def test_record_contains_all_flags() -> None:
    recorded = parse_args(["--use_lora", "--learning_rate", "1e-3"]).to_dict()
    expected = {
        "model_name_or_path": "Qwen/Qwen-7B", "attn_implementation": None, "data_path": None, "eval_data_path": None,
        "lazy_preprocess": False, "system_message": None, "label_mask": "assistant", "use_lora": True, "q_lora": False,
        "lora_r": 64, "lora_alpha": 16, "lora_dropout": 0.05, "lora_target_modules": None, "lora_weight_path": "",
        "any_base": False,
        "lora_bias": "none", "trainable_embeddings": "auto", "cache_dir": None, "model_max_length": 2048,
        "pure_bf16": False, "learning_rate": 1e-3, "seed": 42, "num_train_epochs": 5.0,
    }  # fmt: skip
    assert recorded | expected == recorded
    assert json.loads(json.dumps(recorded, default=str)) is not None


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--use_lora --lora_target_modules w1 --warmup_ratio 1 --label_names labels --debug underflow_overflow",
        "--lr_scheduler_kwargs {} --report_to tensorboard wandb --optim_target_modules a b --eval_steps 0.1",
    ],
)
def test_record_parses_to_the_same_arguments(tmp_path: Path, flags: str) -> None:
    recorded = parse_args([*flags.split(), "--hub_token", "secret", "--resume_from_checkpoint", "x"]).to_dict()
    assert "secret" not in json.dumps(recorded)
    (tmp_path / "run_args.json").write_text(json.dumps(recorded))
    again = parse_args(["--config", str(tmp_path / "run_args.json")])
    assert again.to_dict() == recorded
    assert resumed_checkpoint(again) is None
