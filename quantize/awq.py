"""AWQ (Lin et al. 2023): scale large input channels down and their weights up, so that rounding costs less.

The preceding layer, whose output the inputs are, absorbs the inverse scales. Both searches minimise the error of the
layer's output over the calibration data: ``sum((dW @ gram) * dW)`` for a change ``dW`` of the weight.

Shapes: O outputs, I inputs, g inputs per group, G = I / g groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from checkpoints.packed_weights import IntegerWeight

_NUM_EXPONENTS = 20  # of the input scales, from 0 to 0.95
_NUM_RANGES = 10  # of a group's values, from 1 down to 0.55 of their full range
_BITS = 4


@torch.no_grad()
def search_scales(weights: Sequence[Tensor], gram: Tensor, mean_abs: Tensor, group_size: int) -> Tensor:
    """Search the best column scales for layers with common inputs: ``mean_abs ** a`` over exponents ``a``, normalised.

    Args:
        weights: [O, I] of each layer.
        gram: [I, I], the mean of ``x x^T`` over the inputs ``x``.
        mean_abs: [I], the mean of ``|x|``.
    Returns:
        [I].
    """
    mean_abs = mean_abs.clamp(min=1e-4)
    best, best_error = torch.ones_like(mean_abs), torch.inf
    for step in range(_NUM_EXPONENTS):
        scales = mean_abs ** (step / _NUM_EXPONENTS)
        scales = scales / (scales.max() * scales.min()).sqrt()
        error = 0.0
        for weight in weights:
            change = _dequantized(_round(weight * scales, group_size), group_size) / scales - weight
            error += float(((change @ gram) * change).sum())
        if error < best_error:
            best, best_error = scales, error
    return best


@torch.no_grad()
def quantize_awq(weight: Tensor, gram: Tensor, group_size: int) -> IntegerWeight:
    """Round a weight [O, I] to 4 bits: a scale and a zero point per group of inputs, from the best range of each group.

    Args:
        gram: [I, I], see :func:`search_scales`.
    """
    num_groups = weight.shape[1] // group_size
    # [G, g, g]
    group_grams = torch.stack([gram[s : s + group_size, s : s + group_size] for s in range(0, len(gram), group_size)])
    best = _round(weight, group_size)
    best_error: Tensor | None = None
    for step in range(_NUM_RANGES):
        rounded = _round(weight, group_size, 1 - step / (2 * _NUM_RANGES))
        change = (_dequantized(rounded, group_size) - weight).view(-1, num_groups, group_size)
        # [O, G]
        error = (torch.einsum("ogi,gij->ogj", change, group_grams) * change).sum(-1)
        if best_error is None:
            best_error = error
            continue
        is_better = error < best_error
        best_error = torch.where(is_better, error, best_error)
        columns = is_better.repeat_interleave(group_size, 1)
        best = IntegerWeight(
            torch.where(columns, rounded.values, best.values),
            torch.where(is_better, rounded.scales, best.scales),
            torch.where(is_better, rounded.zeros, best.zeros),
        )
    return best


def _round(weight: Tensor, group_size: int, shrink: float = 1.0) -> IntegerWeight:
    """Round each group of a weight [O, I] to the nearest of the values that divide ``shrink`` times its range."""
    groups = weight.view(len(weight), -1, group_size)
    # The range always contains zero: a zero point of the same number of bits cannot express any other range.
    lowest, highest, max_value = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0), (1 << _BITS) - 1
    scales = ((highest - lowest) * (shrink / max_value)).half().clamp(min=2**-24)
    steps = scales.float()  # the stored scales, not the exact ones
    zeros = (-lowest * shrink / steps).round().clamp(0, max_value)
    values = ((groups / steps[..., None]).round() + zeros[..., None]).clamp(0, max_value)
    return IntegerWeight(values.view_as(weight).int(), scales, zeros.int())


def _dequantized(rounded: IntegerWeight, group_size: int) -> Tensor:
    values = rounded.values.view(len(rounded.values), -1, group_size)
    weight = (values - rounded.zeros[..., None]) * rounded.scales.float()[..., None]
    return weight.view_as(rounded.values)
