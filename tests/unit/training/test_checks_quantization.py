"""Quantisation flags: conflicts with each other, with the checkpoint and with the installed libraries."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from console import pip_command
from errors import ConfigError
from tests.golden import SMALL
from tests.models import TINY, copy_checkpoint
from training.checks import check_args
from training.config.parsing import parse_args

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
Q_LORA = ("--use_lora", "--q_lora")


def complaint(tmp_path: Path, *flags: str, model: Path = TINY) -> str:
    """Return the fault of a valid command line with ``flags`` added; empty if there is none."""
    valid = ("--model_name_or_path", str(model), "--data_path", str(SMALL / "train.json"), "--output_dir")
    try:
        check_args(parse_args([*valid, str(tmp_path / "new"), *flags]))
    except ConfigError as error:
        return str(error)
    return ""


@pytest.fixture(autouse=True)
def with_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that bitsandbytes is installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: object() if name == "bitsandbytes" else find(name, *rest)
    )


@pytest.fixture
def quantised(tmp_path: Path) -> Path:
    return copy_checkpoint(tmp_path / "int4", quantization_config=GPTQ)


def test_flags_with_an_unquantised_checkpoint(tmp_path: Path) -> None:
    for flags in ((), ("--quant_type", "fp4"), ("--load_in_8bit",), ("--bf16",)):
        assert complaint(tmp_path, *Q_LORA, *flags) == ""
    without = "needs --use_lora: without it all parameters are trained. Add --use_lora, or remove"
    assert complaint(tmp_path, "--q_lora") == f"--q_lora {without} --q_lora"
    assert complaint(tmp_path, "--q_lora", "--quant_type", "nf4").splitlines()[1:] == [
        f"  1. --q_lora {without} --q_lora",
        f"  2. --quant_type nf4 {without} --quant_type",
    ]
    needs = "needs --q_lora. Add --q_lora, or remove"
    assert complaint(tmp_path, "--use_lora", "--quant_type", "fp4") == f"--quant_type fp4 {needs} --quant_type fp4"
    assert complaint(tmp_path, "--use_lora", "--load_in_8bit") == f"--load_in_8bit {needs} --load_in_8bit"
    both = "--quant_type nf4 and --load_in_8bit are two types of quantisation. Give one of them"
    assert complaint(tmp_path, *Q_LORA, "--quant_type", "nf4", "--load_in_8bit") == both
    pure = "--q_lora trains in float32, --pure_bf16 in bfloat16. Give --bf16 instead of --pure_bf16"
    assert complaint(tmp_path, *Q_LORA, "--pure_bf16") == pure


def test_flags_with_a_quantised_checkpoint(tmp_path: Path, quantised: Path) -> None:
    assert complaint(tmp_path, *Q_LORA, model=quantised) == ""
    is_quantised = f"--model_name_or_path {quantised} is quantised"
    gptq = "(GPTQ, 4 bits, groups of 128)"
    assert complaint(tmp_path, model=quantised) == (
        f"{is_quantised} {gptq}: its weights cannot be trained. "
        "Train an adapter with --use_lora --q_lora, or give an unquantised checkpoint"
    )
    assert complaint(tmp_path, "--use_lora", model=quantised) == (
        f"{is_quantised} {gptq}: LoRA needs --q_lora. Add --q_lora, or give an unquantised checkpoint"
    )
    for flags in (("--quant_type", "nf4"), ("--load_in_8bit",)):
        shown = " ".join(flags)
        assert complaint(tmp_path, *Q_LORA, *flags, model=quantised) == (
            f"{is_quantised} already {gptq}: {shown} does not apply. Remove {shown}"
        )


def test_dry_run_accepts_a_quantised_checkpoint(tmp_path: Path, quantised: Path) -> None:
    assert complaint(tmp_path, "--dry_run", model=quantised) == ""


def test_unsupported_quantisation_is_refused(tmp_path: Path) -> None:
    model = copy_checkpoint(tmp_path / "hqq", quantization_config={"quant_method": "hqq"})
    assert complaint(tmp_path, *Q_LORA, model=model).startswith(
        f"{model / 'config.json'}: weights quantised by hqq cannot be read. Use the unquantised model"
    )


def test_missing_bitsandbytes_is_refused(tmp_path: Path, quantised: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "bitsandbytes" else find(name, *rest)
    )
    missing = f"needs bitsandbytes, which is not installed. Install it: {pip_command('requirements_qlora.txt')}"
    assert complaint(tmp_path, *Q_LORA) == f"--q_lora (NF4 by bitsandbytes) {missing}"
    assert complaint(tmp_path, *Q_LORA, "--load_in_8bit") == f"--q_lora (8-bit by bitsandbytes) {missing}"
    saved = copy_checkpoint(tmp_path / "nf4", quantization_config=NF4)
    assert complaint(tmp_path, *Q_LORA, model=saved) == f"--model_name_or_path (NF4 by bitsandbytes) {missing}"
    assert complaint(tmp_path, *Q_LORA, model=quantised) == ""  # GPTQ weights are read without it


@pytest.mark.parametrize("name", ["paged_adamw_32bit", "adamw_8bit", "adamw_bnb_8bit", "lion_8bit", "rmsprop_bnb"])
def test_bitsandbytes_optimizers_need_a_gpu(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    needs_gpu = f"--optim {name} needs a GPU, and none is available. Choose another optimizer"
    assert complaint(tmp_path, "--optim", name) == needs_gpu
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert complaint(tmp_path, "--optim", name) == ""
    assert complaint(tmp_path, "--optim", name, "--use_cpu") == needs_gpu


def test_other_optimizers_need_neither_bitsandbytes_nor_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Any = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "bitsandbytes" else real(name, *rest)
    )
    for name in ("adamw_torch", "adamw_torch_8bit", "adafactor", "sgd"):
        assert not re.search("bitsandbytes|GPU", complaint(tmp_path, "--optim", name))
