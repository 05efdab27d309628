"""GPTQ (Frantar et al. 2022): columns are rounded one after the other, and those still to come make up for the error.

Shapes: O outputs, I inputs, g inputs of a group, G = I / g groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from checkpoints.packed_weights import IntegerWeight
from errors import RunError

DAMPING = 0.01
"""Share of the mean diagonal that is added to the Gram matrix, so that it can be inverted."""

_SHRINKS = 16


@torch.no_grad()
def quantize_gptq(weight: Tensor, gram: Tensor, bits: int, group_size: int) -> IntegerWeight:
    """Round a weight so that the layer's outputs change least: symmetric, a scale per group of inputs.

    Groups with the largest inputs come first, and within a group the largest inputs: what is rounded early leaves the
    most columns to make up for it. Groups stay runs of inputs, so nobody who reads the result has to know.

    Args:
        weight: [O, I].
        gram: [I, I], the mean of ``x x^T`` over the inputs ``x`` that the layer sees.

    Raises:
        RunError: inputs that are not finite.
    """
    order = _order(gram.diagonal(), group_size)
    importance = gram.diagonal()[order]
    factor = _inverse_factor(gram[order][:, order])
    # Inputs first, [I, O]: what is read and written at a time then lies together.
    columns = weight.float().T[order].contiguous()
    middle = 1 << (bits - 1)
    values = torch.empty_like(columns, dtype=torch.int32)
    scales = columns.new_empty(len(columns) // group_size, columns.shape[1])
    for number, start in enumerate(range(0, len(columns), group_size)):
        end = start + group_size
        scale = scales[number] = _choose_scale(columns[start:end], importance[start:end], middle)
        errors = torch.empty_like(columns[start:end])
        for place in range(start, end):
            rounded = (columns[place] / scale).round_().clamp_(-middle, middle - 1)
            values[place] = rounded + middle
            error = errors[place - start] = (columns[place] - rounded * scale) / factor[place, place]
            columns[place + 1 : end].addr_(factor[place, place + 1 : end], error, alpha=-1)
        columns[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    groups_back = order[::group_size].div(group_size, rounding_mode="floor").argsort()
    scales = scales[groups_back].T
    return IntegerWeight(values[order.argsort()].T, scales.half(), torch.full_like(scales, middle, dtype=torch.int32))


def _order(importance: Tensor, group_size: int) -> Tensor:
    """[I]: the places of the inputs, group by group."""
    groups = importance.view(-1, group_size)
    within = groups.argsort(dim=1, descending=True, stable=True)
    first = torch.arange(len(groups), device=groups.device)[:, None] * group_size
    return (first + within)[groups.amax(1).argsort(descending=True, stable=True)].flatten()


def _inverse_factor(gram: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of a damped Gram matrix, [I, I]."""
    gram = gram.clone()
    diagonal = gram.diagonal()
    diagonal[diagonal == 0] = 1  # an input that is always zero
    mean = diagonal.mean()
    if not torch.isfinite(mean):
        raise RunError("a layer's inputs are not finite while it is quantised", "Check the weights of the checkpoint")
    damping = DAMPING
    while damping < 10:
        diagonal += damping * mean
        lower, failed = torch.linalg.cholesky_ex(gram)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        damping *= 2
    raise RunError("a layer's inputs give no positive definite matrix", "Give more --samples, or other --data_path")


def _choose_scale(columns: Tensor, importance: Tensor, middle: int) -> Tensor:
    """[O]: of some scales at and below the one that covers the largest weight, the one with the least error.

    They are rounded to what is stored, so that the columns to come also make up for that.

    Args:
        columns: [g, O].
        importance: [g], how much an error in each column counts.
    """
    largest = columns.abs().amax(0)
    largest[largest == 0] = 1
    best_error = torch.full_like(largest, torch.inf)
    best = torch.empty_like(largest)
    for step in range(_SHRINKS):
        scale = (largest / (middle - 0.5) * (1 - step / (2 * _SHRINKS))).half().float().clamp(min=2**-24)
        rounded = (columns / scale).round_().clamp_(-middle, middle - 1) * scale
        error = importance @ (rounded - columns).square_()
        is_better = error < best_error
        best_error = torch.where(is_better, error, best_error)
        best = torch.where(is_better, scale, best)
    return best
