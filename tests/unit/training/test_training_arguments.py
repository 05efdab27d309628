"""transformers' TrainingArguments of a run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import TrainingArguments

import finetune
from errors import ConfigError
from tests.models import TINY, write_conversations
from training.config.parsing import parse_args
from training.training_arguments import build_training_arguments, remove_accelerate_variables


def test_bf16_works_without_a_gpu() -> None:
    for form in (["--bf16"], ["--bf16", "True"]):
        training = build_training_arguments(parse_args(form))
        assert training.bf16 is True
        assert training.use_cpu is not torch.cuda.is_available()


def test_refusal_by_transformers_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^command line: .*torch_empty_cache_steps"):
        build_training_arguments(parse_args(["--torch_empty_cache_steps", "0"]))


def test_a_dry_run_reports_what_only_transformers_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with a launcher's variables and an engine, neither of which is started."""
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"),
                        ("MASTER_PORT", "29555")):  # fmt: skip
        monkeypatch.setenv(name, value)

    def refuse(self: TrainingArguments) -> None:
        raise ValueError("a new rule\nof transformers")

    monkeypatch.setattr(TrainingArguments, "_validate_args", refuse)
    data = write_conversations(tmp_path / "train.json")
    words = ["--model_name_or_path", str(TINY), "--data_path", str(data), "--fsdp", "--dry_run"]
    with pytest.raises(ConfigError, match=r"^command line: transformers refuses the arguments \(a new rule of trans"):
        finetune.main(words)
    assert not torch.distributed.is_initialized() and os.environ["WORLD_SIZE"] == "2"


def test_accelerate_variables_have_no_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("ACCELERATE_MIXED_PRECISION", "bf16"), ("ACCELERATE_USE_CPU", "true")):
        monkeypatch.setenv(name, value)
    remove_accelerate_variables()
    training = build_training_arguments(parse_args([]))
    assert (training.bf16, training.mixed_precision) == (False, "no")
    assert Accelerator(mixed_precision=None, cpu=True).mixed_precision == "no"


def test_several_gpus_in_one_process_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    message = (
        r"^2 GPUs are visible to one process\. Set CUDA_VISIBLE_DEVICES=0, or launch with "
        r"torchrun --nproc_per_node 2 finetune\.py \.\.\.$"
    )
    with pytest.raises(ConfigError, match=message):
        build_training_arguments(parse_args(["--output_dir", str(tmp_path)]))
