"""Tiny bases, adapters and merged folders for the tests of export.verify."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from checkpoints.adapter import read_adapter
from checkpoints.dequantized_reader import open_dequantized
from checkpoints.files import load_json, save_json
from checkpoints.fold import WeightedAdapter, plan_fold
from checkpoints.source import InDtype
from checkpoints.writing import save_source
from export.layouts.config import config_to_qwen2
from export.layouts.tensors import tensors_to_qwen2
from export.verify.behaviour import Comparison
from export.verify.compare import Verification, describe, verify_merge
from export.verify.samples import choose_samples
from qwen_model.register import register_qwen
from tests.models import copy_checkpoint, copy_tied, write_later_checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LINEAR = {
    "qwen": ["c_attn", "attn.c_proj", "w1", "w2", "mlp.c_proj"],
    "qwen2": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
LINEAR["qwen3"] = LINEAR["qwen2"]


def make_base(folder: Path, family: str, tied: bool = False) -> Path:
    """Write a tiny checkpoint with random biases and norms."""
    if family == "qwen":
        copy_tied(folder) if tied else copy_checkpoint(folder)
    else:
        write_later_checkpoint(folder, family, tied=tied)
    generator = torch.Generator().manual_seed(3)
    change(
        folder,
        lambda tensors: {
            name: tensor + 0.2 * torch.randn(tensor.shape, generator=generator) if tensor.dim() == 1 else tensor
            for name, tensor in tensors.items()
        },
    )
    return folder


def make_adapter(base: Path, folder: Path, size: float = 0.1, seed: int = 1, **options: Any) -> Path:
    """Save with peft a LoRA adapter whose trainable values are all random."""
    register_qwen()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    targets = {"target_modules": LINEAR[model.config.model_type]}
    config = LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8} | targets | options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model = get_peft_model(model, config)
        generator = torch.Generator().manual_seed(seed)
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.data += size * torch.randn(parameter.shape, generator=generator)
        peft_model.save_pretrained(folder)
    return folder


def load_peft_model(base: Path, adapter: Path) -> Any:
    register_qwen()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return PeftModel.from_pretrained(model, adapter).eval()


def weighted(*adapters: Path) -> list[WeightedAdapter]:
    return [WeightedAdapter(read_adapter(folder)) for folder in adapters]


def merge(
    base: Path, adapters: list[WeightedAdapter], merged: Path, dtype: str = "float32", layout: str | None = None
) -> Path:
    """Write the merged folder with the base's tokenizer."""
    config = load_json(base / "config.json")
    fold = plan_fold(open_dequantized(base, torch.float16), config, adapters)
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    if fold.untied:
        config["tie_word_embeddings"] = False
    source = InDtype(fold, DTYPES[dtype])
    shutil.copytree(base, merged, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    save_source(source if layout is None else tensors_to_qwen2(source, config), merged, 10**9)
    save_json(config if layout is None else config_to_qwen2(config), merged / "config.json")
    return merged


def verify(base: Path, adapters: list[WeightedAdapter], merged: Path) -> Verification:
    config = load_json(base / "config.json")
    samples = choose_samples(adapters, merged, config["vocab_size"])
    source = open_dequantized(base, torch.float16)
    return verify_merge(Comparison(source, config, adapters, merged, samples), "nearest")


def assert_passes(base: Path, adapters: list[WeightedAdapter], merged: Path) -> Verification:
    result = verify(base, adapters, merged)
    assert not result.faults, describe(result)
    assert describe(result).startswith("verified: ")
    return result


def assert_reports(result: Verification, name: str) -> None:
    """Check that exactly one tensor is reported."""
    assert len(result.faults) == 1 and result.faults[0].startswith(f"{name}: "), result.faults
    assert "DIFFERS" in describe(result) and result.faults[0] in describe(result)


def change(folder: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Replace the tensors of a folder with one weight file by ``edit`` of them."""
    file = folder / "model.safetensors"
    tensors = edit({name: tensor.clone() for name, tensor in load_file(file).items()})
    save_file(tensors, file, metadata={"format": "pt"})


def zero(folder: Path, name: str) -> None:
    change(folder, lambda tensors: {**tensors, name: torch.zeros_like(tensors[name])})
