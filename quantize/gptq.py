"""GPTQ (Frantar et al. 2022): round a weight column by column; the remaining columns compensate for the error.

Shapes: O outputs, I inputs, g inputs per group, G = I / g groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from checkpoints.model_config import Quantization
from checkpoints.packed_weights import IntegerWeight
from errors import RunError
from quantize.descent import descend

MIN_DAMPING = 0.01
"""Share of its median diagonal that is added to the Gram matrix, so that it can be inverted, at least."""
_MAX_DOUBLINGS = 10  # of the damping, if the matrix cannot be inverted

_NUM_RANGES = 16  # tried per group, from the full range of its weights down to 0.53 of it


def is_symmetric(quantization: Quantization) -> bool:
    """Whether all zero points are the middle value: some kernels read no others, and 8 bits lose nothing by it."""
    return quantization.symmetric or quantization.bits == 8


@torch.no_grad()
def quantize_gptq(weight: Tensor, gram: Tensor, num_tokens: int, quantization: Quantization) -> IntegerWeight:
    """Round a weight so that the layer's outputs change least: a scale and a zero point per group of inputs.

    Groups with the largest inputs are rounded first, and within a group the largest inputs: the earlier a column is
    rounded, the more columns remain to compensate for its error. Groups consist of consecutive inputs in the result,
    so that it needs no act-order. Coordinate descent follows.

    The Gram matrix is damped by twice the number of inputs per token: the fewer tokens were seen, the more of what it
    says is chance.

    Args:
        weight: [O, I].
        gram: [I, I], see ``blocks.measure_gram``.
        num_tokens: on which the Gram matrix was measured.

    Raises:
        RunError: inputs that are not finite, or that give no positive definite Gram matrix.
    """
    group_size, max_value = quantization.group_size, (1 << quantization.bits) - 1
    order = _order(gram.diagonal(), group_size)
    gram, factor = _damp(gram[order][:, order], max(MIN_DAMPING, 2 * len(order) / num_tokens))
    # The cost of an error in a column, after all later columns have compensated for it.
    importance = factor.diagonal() ** -2
    # [I, O], so that a column is contiguous.
    original = weight.float().T[order].contiguous()
    columns, values = original.clone(), torch.empty_like(original)
    scales, zeros = torch.empty(2, len(columns) // group_size, columns.shape[1], device=columns.device)
    for group, start in enumerate(range(0, len(columns), group_size)):
        end = start + group_size
        scale, zero = _choose_grid(columns[start:end], importance[start:end], quantization)
        scales[group], zeros[group] = scale, zero
        errors = torch.empty_like(columns[start:end])
        for i in range(start, end):
            value = values[i] = _nearest(columns[i], scale, zero, max_value)
            error = errors[i - start] = (columns[i] - (value - zero) * scale) / factor[i, i]
            columns[i + 1 : end].addr_(factor[i, i + 1 : end], error, alpha=-1)
        columns[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    descend(original, values, scales, zeros, gram, max_value)
    group_order = order[::group_size].div(group_size, rounding_mode="floor").argsort()
    return IntegerWeight(values[order.argsort()].T.int(), scales[group_order].T.half(), zeros[group_order].T.int())


def _order(importance: Tensor, group_size: int) -> Tensor:
    """[I]: the order in which the inputs are rounded, group by group."""
    groups = importance.view(-1, group_size)
    within = groups.argsort(dim=1, descending=True, stable=True)
    first = torch.arange(len(groups), device=groups.device)[:, None] * group_size
    return (first + within)[groups.amax(1).argsort(descending=True, stable=True)].flatten()


def _damp(gram: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return the damped Gram matrix [I, I] and the upper Cholesky factor [I, I] of its inverse.

    Args:
        damping: relative to the median diagonal; in the mean a few large inputs would drown all others.
    """
    gram = gram.clone()
    diagonal = gram.diagonal()
    if not torch.isfinite(diagonal).all():
        raise RunError("the inputs of a layer to be quantised are not finite", "Check the weights of the checkpoint")
    is_zero = diagonal == 0  # inputs that are always zero
    median = 1.0 if is_zero.all() else float(diagonal[~is_zero].median())
    diagonal[is_zero] = median
    for _ in range(_MAX_DOUBLINGS):
        diagonal += damping * median
        lower, failed = torch.linalg.cholesky_ex(gram)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return gram, upper
        damping *= 2
    raise RunError(
        "the inputs of a layer give no positive definite Gram matrix", "Give more --samples, or another --data_path"
    )


def _choose_grid(columns: Tensor, importance: Tensor, quantization: Quantization) -> tuple[Tensor, Tensor]:
    """Choose scale and zero point of each output [O] with the least error; their range is at most that of the weights.

    Scales are rounded to float16 as they are stored, so that the remaining columns compensate for that error too.

    Args:
        columns: [g, O].
        importance: [g], the weight of an error in each column.
    """
    max_value = (1 << quantization.bits) - 1
    # The range contains zero: a zero point of the same number of bits cannot express any other.
    lowest, highest = columns.amin(0).clamp(max=0), columns.amax(0).clamp(min=0)
    if is_symmetric(quantization):
        highest = torch.maximum(highest, -lowest)
        lowest = -highest
    width = highest - lowest
    width[width == 0] = 1
    best_error = torch.full_like(width, torch.inf)
    best_scale, best_zero = torch.empty_like(width), torch.empty_like(width)
    for step in range(_NUM_RANGES):
        share = 1 - step / (2 * _NUM_RANGES)
        scale = (width * share / max_value).half().float().clamp(min=2**-24)
        zero = (-lowest * share / scale).round_().clamp_(quantization.zero_offset, max_value)
        if is_symmetric(quantization):
            zero.fill_((max_value + 1) // 2)
        rounded = (_nearest(columns, scale, zero, max_value) - zero) * scale
        error = importance @ (rounded - columns).square_()
        is_better = error < best_error
        best_error = torch.where(is_better, error, best_error)
        best_scale, best_zero = torch.where(is_better, scale, best_scale), torch.where(is_better, zero, best_zero)
    return best_scale, best_zero


def _nearest(columns: Tensor, scale: Tensor, zero: Tensor, max_value: int) -> Tensor:
    return (columns / scale).round_().add_(zero).clamp_(0, max_value)
