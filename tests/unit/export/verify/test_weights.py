"""One wrong tensor is reported as the one that differs; correct rounding of any kind is not."""

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
from checkpoints.model_config import Rounding
from export.verify.reference import MatrixChange
from export.verify.weights import TensorCheck
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
        assert_reports(verify(base, adapters, merged), name)


def test_missing_lora_of_one_layer_is_reported(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen2")
    adapters = weighted(make_adapter(base, tmp_path / "adapter", size=0.02))
    whole = adapters[0].adapter
    edits = {name: edit for name, edit in whole.edits.items() if name != "model.layers.1.mlp.up_proj.weight"}
    partial = [WeightedAdapter(replace(whole, edits=edits))]
    merged = merge(base, partial, tmp_path / "merged", "bfloat16")
    assert_passes(base, partial, merged)
    assert_reports(verify(base, adapters, merged), "model.layers.1.mlp.up_proj.weight")


ROWS, COLUMNS, RANK = 256, 640, 4


def by_chance(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Round up or down so that the expected value is the exact one."""
    nearest = exact.to(dtype)
    above = torch.where(nearest.float() < exact, math.inf, -math.inf).to(dtype)
    other = torch.nextafter(nearest, above)
    probability = (exact - nearest.float()).abs() / (other.float() - nearest.float()).abs()
    generator = torch.Generator().manual_seed(5)
    return torch.where(torch.rand(exact.shape, generator=generator) < probability, other, nearest)


WRITTEN: dict[Rounding, Callable[[Tensor, torch.dtype], Tensor]] = {"nearest": Tensor.to, "dithered": by_chance}


def matrix(size: float, dtype: torch.dtype) -> tuple[Tensor, MatrixChange]:
    """A matrix whose values are 2^-6 to 2^-5, and a change of ``size`` relative to them."""
    generator = torch.Generator().manual_seed(4)
    base = 2**-6 * (1 + torch.rand(ROWS, COLUMNS, generator=generator))
    base *= torch.randn(ROWS, COLUMNS, generator=generator).sign()
    up, down = torch.randn(ROWS, RANK, generator=generator), torch.randn(RANK, COLUMNS, generator=generator)
    return base.to(dtype), MatrixChange(1.0, up=up * size * 0.01, down=down)


def faults_of(
    base: Tensor, change: MatrixChange, written: Tensor, rounding: Rounding = "dithered", step: int = 1
) -> list[str]:
    check = TensorCheck("layer", written.dtype, rounding, step)
    for first in range(0, ROWS, 100):
        rows = slice(first, min(first + 100, ROWS))
        assert change.up is not None
        check.compare(base[rows], [replace(change, up=change.up[rows])], written[rows], first)
    return check.faults()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [1e-5, 1e-3, 1.0])
@pytest.mark.parametrize("rounding", WRITTEN)
def test_correct_rounding_is_not_reported(rounding: Rounding, size: float, dtype: torch.dtype) -> None:
    write = Tensor.to if dtype == torch.float32 else WRITTEN[rounding]
    base, change = matrix(size, dtype)
    assert faults_of(base, change, write(change.matrix(base.float()), dtype), rounding) == []


@pytest.mark.parametrize(
    ("rounding", "factor"),
    [("nearest", 0.0), ("nearest", 0.5), *(("dithered", factor) for factor in (0.0, 0.5, 1.5, 2.0))],
)
def test_small_change_with_another_scale_is_reported(rounding: Rounding, factor: float) -> None:
    """The change is below the distance of neighbouring values, so no single value tells."""
    base, change = matrix(5e-4, torch.bfloat16)
    assert change.up is not None
    scaled = replace(change, up=factor * change.up)
    written = WRITTEN[rounding](scaled.matrix(base.float()), torch.bfloat16)
    (fault,) = faults_of(base, change, written, rounding)
    assert fault.startswith("layer: ")
    if (rounding, factor) == ("dithered", 0.0):
        assert "has 0% of the adapter's change, rounding leaves" in fault


@pytest.mark.parametrize("rounding", WRITTEN)
def test_unchanged_row_of_a_changed_matrix_is_compared_bit_for_bit(rounding: Rounding) -> None:
    base, change = matrix(1e-2, torch.bfloat16)
    assert change.up is not None
    change.up[130] = 0
    written = WRITTEN[rounding](change.matrix(base.float()), torch.bfloat16)
    assert faults_of(base, change, written, rounding) == []
    written[130, 7] = torch.nextafter(written[130, 7], torch.tensor(1.0, dtype=torch.bfloat16))
    (fault,) = faults_of(base, change, written, rounding)
    assert fault.startswith("layer: row 130 ")


def test_row_without_its_small_change_is_reported() -> None:
    base, change = matrix(1e-3, torch.bfloat16)
    written = by_chance(change.matrix(base.float()), torch.bfloat16)
    written[130] = base[130]
    assert faults_of(base, change, written) == ["layer: row 130 is the base's, without the adapter's change"]


@pytest.mark.parametrize(("dtype", "step"), [(torch.bfloat16, 1), (torch.bfloat16, 3), (torch.float16, 1)])
def test_a_missing_rank_is_reported_where_nearly_all_of_the_change_is_there(dtype: torch.dtype, step: int) -> None:
    """All changes are positive, with and without rank 2: the neighbours of the exact values are the same."""
    base, change = matrix(2e-3 if dtype == torch.bfloat16 else 2.5e-4, dtype)
    assert change.up is not None and change.down is not None
    change.up.abs_().clamp_(max=3e-5 if dtype == torch.bfloat16 else 4e-6)[:, 2] *= 0.2
    change.down.abs_().clamp_(max=1)
    without = change.up.clone()
    without[:, 2] = 0
    right, wrong = (by_chance(each.matrix(base.float()), dtype) for each in (change, replace(change, up=without)))
    assert faults_of(base, change, right, step=step) == []
    (fault,) = faults_of(base, change, wrong, step=step)
    assert " of what rank 2 adds to it, rounding leaves " in fault


def test_small_value_with_the_wrong_sign_is_reported() -> None:
    base, change = matrix(1e-2, torch.bfloat16)
    written = by_chance(change.matrix(base.float()), torch.bfloat16)
    smallest = int(written[130].abs().argsort()[5])
    written[130, smallest] *= -1
    (fault,) = faults_of(base, change, written)
    assert fault.startswith("layer: row 130 is off by ")


def test_layer_of_the_base_is_no_dithered_merge_of_a_tiny_change() -> None:
    """The change is a hundredth of the distance of two values: rounded to nearest, it would move almost none."""
    base, change = matrix(5e-5, torch.bfloat16)
    assert faults_of(base, change, base, "dithered") != []
