"""transformers' TrainingArguments of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import TrainingArguments

from errors import ConfigError
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
