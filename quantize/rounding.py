"""Rounding to nearest, which every other method has to improve on, and the error that they minimise.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def round_to_nearest(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """Round each group of a weight [O, I] to the nearest of ``2 ** bits`` values that divide its range evenly."""
    groups = weight.view(len(weight), -1, group_size)
    lowest, highest, max_value = groups.amin(-1, True).clamp(max=0), groups.amax(-1, True).clamp(min=0), 2**bits - 1
    steps = ((highest - lowest) / max_value).half().float().clamp(min=2**-24)
    zeros = (-lowest / steps).round()
    values = ((groups / steps).round() + zeros).clamp(0, max_value)
    return ((values - zeros) * steps).view_as(weight)


def relative_error(weight: Tensor, quantised: Tensor, gram: Tensor) -> float:
    """Return the norm of the change of a layer's outputs relative to that of the outputs, from its inputs' Gram matrix.

    Args:
        weight, quantised: [O, I].
        gram: [I, I], the mean of ``x x^T`` over the inputs ``x``.
    """
    change = quantised - weight
    errors, total = ((each @ gram).mul_(each).sum().clamp(min=0) for each in (change, weight))
    return float((errors / total.clamp(min=torch.finfo(torch.float32).tiny)).sqrt())
