"""Operations with their own gradients: results and gradients of the formulas that autograd differentiates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from qwen_model.fused_ops import rms_norm, rotate
from qwen_model.modeling_qwen import QWenRMSNorm
from qwen_model.rope import rotate as rotate_heads_first

FLOAT, HALF = torch.float32, torch.bfloat16


def random(*shape: int, dtype: torch.dtype = FLOAT, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_same(actual: Callable[..., Tensor], expected: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Compare outputs and the gradients of all inputs that require one, by the norm of each tensor."""
    results = []
    for function in (actual, expected):
        leaves = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in inputs]
        output = function(*leaves)
        output.backward(random(*output.shape, dtype=output.dtype, seed=1))
        results.append((output, *(leaf.grad for leaf in leaves)))
    for one, other in zip(*results, strict=True):
        assert (one is None) == (other is None)
        if one is None or other is None:
            continue
        assert one.dtype == other.dtype and one.shape == other.shape
        limit = 1e-6 if one.dtype == FLOAT and inputs[0].dtype == FLOAT else 2**-7
        assert (one.float() - other.float()).norm() <= limit * other.float().norm()


@pytest.mark.parametrize("is_trained", [True, False])
@pytest.mark.parametrize("dtypes", [(FLOAT, FLOAT), (HALF, HALF), (HALF, FLOAT), (FLOAT, HALF)])
@pytest.mark.parametrize("norm_class", [Qwen2RMSNorm, QWenRMSNorm])
def test_norm_is_that_of_the_class(norm_class: Any, dtypes: tuple[torch.dtype, torch.dtype], is_trained: bool) -> None:
    norm = norm_class(24, eps=1e-5)

    def of_class(states: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight}, states)

    states, weight = random(2, 5, 24, dtype=dtypes[0]), random(24, dtype=dtypes[1], seed=2)
    inputs = states.requires_grad_(), weight.requires_grad_(is_trained)
    assert_same(lambda states, weight: rms_norm(states, weight, 1e-5), of_class, *inputs)
    assert_same(lambda *inputs: rms_norm(*inputs, 1e-5), of_class, states.detach(), random(24).requires_grad_())


@pytest.mark.parametrize("rotated", [8, 6])
@pytest.mark.parametrize("dtype", [FLOAT, HALF])
def test_rotation_is_that_of_queries_with_heads_first(rotated: int, dtype: torch.dtype) -> None:
    tables = random(2, 5, rotated, seed=2), random(2, 5, rotated, seed=3)
    states = random(2, 5, 3, 8, dtype=dtype).requires_grad_()
    assert_same(
        lambda states: rotate(states, *tables, dtype),
        lambda states: rotate_heads_first(states.transpose(1, 2), tables).transpose(1, 2),
        states,
    )


def test_rotation_takes_slices_and_rounds_to_the_dtype_that_is_asked_for() -> None:
    tables = random(1, 5, 8, seed=2), random(1, 5, 8, seed=3)
    stacked = random(2, 5, 3, 4, 8)
    of_slice, of_copy = (rotate(states, *tables, HALF) for states in (stacked[:, :, 1], stacked[:, :, 1].clone()))
    assert of_slice.dtype == HALF and torch.equal(of_slice, of_copy)
    assert torch.equal(of_copy, rotate(stacked[:, :, 1], *tables, FLOAT).to(HALF))


@pytest.mark.parametrize(
    ("function", "shapes", "kept"),
    [
        (lambda states, weight: rms_norm(states, weight, 1e-6), [(6, 24), (24,)], 4 * (6 * 24 + 6 + 24)),
        (lambda states, cos, sin: rotate(states, cos, sin, FLOAT), [(1, 6, 3, 8), (1, 6, 8), (1, 6, 8)], 4 * 2 * 6 * 8),
    ],
    ids=["norm", "rotation"],
)
def test_what_is_kept_for_the_backward_pass(function: Any, shapes: list[tuple[int, ...]], kept: int) -> None:
    sizes: list[int] = []
    inputs = [random(*shape).requires_grad_(index == 0) for index, shape in enumerate(shapes)]
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: sizes.append(tensor.nbytes), lambda _: _):
        function(*inputs)
    assert sum(sizes) == kept
