"""GPTQ (Frantar et al. 2022): round a weight column by column; the remaining columns compensate for the error.

Shapes: O outputs, I inputs, g inputs per group, G = I / g groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from checkpoints.packed_weights import IntegerWeight
from errors import RunError

DAMPING = 0.01
"""Share of its mean diagonal that is added to the Gram matrix, so that it can be inverted."""

_NUM_SCALES = 16  # tried per group, from the full range of its weights down to 0.53 of it


@torch.no_grad()
def quantize_gptq(weight: Tensor, gram: Tensor, bits: int, group_size: int) -> IntegerWeight:
    """Round a weight so that the layer's outputs change least: symmetric, one scale per group of inputs.

    Groups with the largest inputs are rounded first, and within a group the largest inputs: the earlier a column is
    rounded, the more columns remain to compensate for its error. Groups consist of consecutive inputs in the result,
    so that it needs no act-order.

    Args:
        weight: [O, I].
        gram: [I, I], the mean of ``x x^T`` over the layer's inputs ``x``.

    Raises:
        RunError: inputs that are not finite, or that give no positive definite Gram matrix.
    """
    order = _order(gram.diagonal(), group_size)
    importance = gram.diagonal()[order]
    factor = _inverse_factor(gram[order][:, order])
    # [I, O], so that a column is contiguous.
    columns = weight.float().T[order].contiguous()
    middle = 1 << (bits - 1)
    values = torch.empty_like(columns, dtype=torch.int32)
    scales = columns.new_empty(len(columns) // group_size, columns.shape[1])
    for group, start in enumerate(range(0, len(columns), group_size)):
        end = start + group_size
        scale = scales[group] = _choose_scale(columns[start:end], importance[start:end], middle)
        errors = torch.empty_like(columns[start:end])
        for i in range(start, end):
            rounded = (columns[i] / scale).round_().clamp_(-middle, middle - 1)
            values[i] = rounded + middle
            error = errors[i - start] = (columns[i] - rounded * scale) / factor[i, i]
            columns[i + 1 : end].addr_(factor[i, i + 1 : end], error, alpha=-1)
        columns[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    group_order = order[::group_size].div(group_size, rounding_mode="floor")
    scales = scales[group_order.argsort()].T
    return IntegerWeight(values[order.argsort()].T, scales.half(), torch.full_like(scales, middle, dtype=torch.int32))


def _order(importance: Tensor, group_size: int) -> Tensor:
    """[I]: the order in which the inputs are rounded, group by group."""
    groups = importance.view(-1, group_size)
    within = groups.argsort(dim=1, descending=True, stable=True)
    first = torch.arange(len(groups), device=groups.device)[:, None] * group_size
    return (first + within)[groups.amax(1).argsort(descending=True, stable=True)].flatten()


def _inverse_factor(gram: Tensor) -> Tensor:
    """Return the upper Cholesky factor [I, I] of the inverse of the damped Gram matrix."""
    gram = gram.clone()
    diagonal = gram.diagonal()
    diagonal[diagonal == 0] = 1  # inputs that are always zero
    mean = diagonal.mean()
    if not torch.isfinite(mean):
        raise RunError("the inputs of a layer to be quantised are not finite", "Check the weights of the checkpoint")
    damping = DAMPING
    while damping < 10:
        diagonal += damping * mean
        lower, failed = torch.linalg.cholesky_ex(gram)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        damping *= 2
    raise RunError(
        "the inputs of a layer give no positive definite Gram matrix", "Give more --samples, or another --data_path"
    )


def _choose_scale(columns: Tensor, importance: Tensor, middle: int) -> Tensor:
    """Choose the scale of each output [O] with the least error, at or below the scale that covers its largest weight.

    Scales are rounded to float16 as they are stored, so that the remaining columns compensate for that error too.

    Args:
        columns: [g, O].
        importance: [g], the weight of an error in each column.
    """
    largest = columns.abs().amax(0)
    largest[largest == 0] = 1
    best_error = torch.full_like(largest, torch.inf)
    best = torch.empty_like(largest)
    for step in range(_NUM_SCALES):
        scale = (largest / (middle - 0.5) * (1 - step / (2 * _NUM_SCALES))).half().float().clamp(min=2**-24)
        rounded = (columns / scale).round_().clamp_(-middle, middle - 1) * scale
        error = importance @ (rounded - columns).square_()
        is_better = error < best_error
        best_error = torch.where(is_better, error, best_error)
        best = torch.where(is_better, scale, best)
    return best
