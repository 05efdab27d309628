"""AWQ (Lin et al. 2023): inputs that are large are made smaller and their weights larger, so that rounding hurts less.

What makes the inputs smaller is the layer before, whose output they are. All searches weigh an error of the weight by
the Gram matrix of the inputs, which gives the error of the layer's output over the calibration data.

Shapes: O outputs, I inputs, g inputs of a group, G = I / g groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from checkpoints.packed_weights import IntegerWeight

_STRENGTHS = 20
_SHRINKS = 10
_BITS = 4


@torch.no_grad()
def search_scales(weights: Sequence[Tensor], gram: Tensor, sizes: Tensor, group_size: int) -> Tensor:
    """[I]: what to multiply the columns of some layers with the same inputs by, ``sizes ** a`` with the best ``a``.

    Args:
        weights: [O, I] each.
        gram: [I, I], the mean of ``x x^T`` over the inputs ``x``.
        sizes: [I], the mean of ``|x|``.
    """
    sizes = sizes.clamp(min=1e-4)
    best, best_error = torch.ones_like(sizes), torch.inf
    for step in range(_STRENGTHS):
        scales = sizes ** (step / _STRENGTHS)
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
    """Round a weight [O, I] to 4 bits: a scale and a zero point per group of inputs, whose range is searched for.

    Args:
        gram: [I, I], as above.
    """
    count = weight.shape[1] // group_size
    within = torch.stack([gram[s : s + group_size, s : s + group_size] for s in range(0, len(gram), group_size)])
    best = _round(weight, group_size)
    best_error: Tensor | None = None
    for step in range(_SHRINKS):
        rounded = _round(weight, group_size, 1 - step / (2 * _SHRINKS))
        change = (_dequantized(rounded, group_size) - weight).view(-1, count, group_size)
        # [O, G]
        error = (torch.einsum("ogi,gij->ogj", change, within) * change).sum(-1)
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
    """Round to the nearest within ``shrink`` times each group's range."""
    groups = weight.view(len(weight), -1, group_size)
    # Zero is always within the range: nothing else can be expressed by a zero point of as many bits.
    lowest, highest, largest = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0), (1 << _BITS) - 1
    scales = ((highest - lowest) * (shrink / largest)).half().clamp(min=2**-24)
    steps = scales.float()
    zeros = (-lowest * shrink / steps).round().clamp(0, largest)
    values = ((groups / steps[..., None]).round() + zeros[..., None]).clamp(0, largest)
    return IntegerWeight(values.view_as(weight).int(), scales, zeros.int())


def _dequantized(rounded: IntegerWeight, group_size: int) -> Tensor:
    values = rounded.values.view(len(rounded.values), -1, group_size)
    weight = (values - rounded.zeros[..., None]) * rounded.scales.float()[..., None]
    return weight.view_as(rounded.values)
