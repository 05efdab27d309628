"""One wrong tensor is reported as the one part that differs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints.fold import WeightedAdapter
from tests.verification import (
    assert_passes,
    assert_reports,
    make_adapter,
    make_base,
    merge,
    verify,
    weighted,
)


def zeroed(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor)


def scaled(tensor: Tensor) -> Tensor:
    return tensor * 1.05


def swapped(tensor: Tensor) -> Tensor:
    tensor[[3, 8]] = tensor[[8, 3]]
    return tensor


def plus_one(tensor: Tensor) -> Tensor:
    tensor.view(-1)[5] += 1
    return tensor


def plus_a_tenth(tensor: Tensor) -> Tensor:
    tensor.view(-1)[5] += 0.1
    return tensor


def not_a_number(tensor: Tensor) -> Tensor:
    tensor.view(-1)[5] = math.nan
    return tensor


CORRUPTIONS: dict[str, list[tuple[str, Callable[[Tensor], Tensor]]]] = {
    "qwen": [
        ("transformer.h.1.attn.c_attn.weight", zeroed),
        ("transformer.h.0.attn.c_attn.weight", swapped),
        ("transformer.h.1.attn.c_attn.bias", plus_one),
        ("transformer.h.1.mlp.w2.weight", scaled),
        ("transformer.h.0.ln_1.weight", plus_a_tenth),
        ("transformer.ln_f.weight", plus_a_tenth),
        ("transformer.wte.weight", zeroed),
        ("lm_head.weight", swapped),
    ],
    "qwen2": [
        ("model.layers.0.self_attn.o_proj.weight", scaled),
        ("model.layers.1.self_attn.q_proj.weight", scaled),
        ("model.layers.1.self_attn.q_proj.weight", swapped),
        ("model.layers.1.self_attn.v_proj.bias", plus_one),
        ("model.layers.0.self_attn.k_proj.bias", plus_one),
        ("model.layers.0.mlp.down_proj.weight", swapped),
        ("model.layers.1.mlp.gate_proj.weight", not_a_number),
        ("model.layers.1.post_attention_layernorm.weight", plus_a_tenth),
        ("lm_head.weight", plus_one),
    ],
    "qwen3": [
        ("model.layers.0.self_attn.q_norm.weight", plus_a_tenth),
        ("model.layers.1.self_attn.v_proj.weight", scaled),
        ("model.layers.1.mlp.up_proj.weight", zeroed),
        ("model.norm.weight", scaled),
        ("model.embed_tokens.weight", swapped),
        ("lm_head.weight", zeroed),
    ],
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", CORRUPTIONS)
def test_one_wrong_tensor_is_reported(tmp_path: Path, family: str, dtype: str) -> None:
    base = make_base(tmp_path / "base", family)
    adapters = weighted(make_adapter(base, tmp_path / "adapter"))
    merged = merge(base, adapters, tmp_path / "merged", dtype)
    assert_passes(base, adapters, merged)
    before = {name: tensor.clone() for name, tensor in load_file(merged / "model.safetensors").items()}
    for name, corrupt in CORRUPTIONS[family]:
        changed = corrupt(before[name].clone())
        assert not torch.equal(changed, before[name])
        save_file({**before, name: changed}, merged / "model.safetensors", metadata={"format": "pt"})
        part = name.removesuffix(".weight")
        if ".layers." in name or ".h." in name:
            part = ".".join(name.split(".")[:3])
        assert_reports(verify(base, adapters, merged), part)


def test_missing_lora_of_one_layer_is_reported(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen2")
    adapters = weighted(make_adapter(base, tmp_path / "adapter", size=0.02))
    whole = adapters[0].adapter
    edits = {name: edit for name, edit in whole.edits.items() if name != "model.layers.1.mlp.up_proj.weight"}
    partial = [WeightedAdapter(replace(whole, edits=edits))]
    merged = merge(base, partial, tmp_path / "merged", "bfloat16")
    assert_passes(base, partial, merged)
    assert_reports(verify(base, adapters, merged), "model.layers.1")
