"""Coordinate descent on a rounded weight: change one scale or one column of values at a time, so that the error falls.

Shapes: O outputs, I inputs, g inputs per group, G = I / g groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

NUM_SWEEPS = 3
"""Times that every scale and value is chosen again; each costs about as much as half of GPTQ."""


def descend(columns: Tensor, values: Tensor, scales: Tensor, zeros: Tensor, gram: Tensor, max_value: int) -> None:
    """Lower the error of the outputs, ``trace(change.T @ gram @ change)``, by better values and scales, in place.

    Group by group the scale is fitted by least squares, then the values of each column are rounded to nearest of what
    would be best beside all other columns. GPTQ chooses both before later columns are known.

    Args:
        columns: [I, O], the weight, transposed.
        values: [I, O], from 0 to ``max_value``, in float32.
        scales, zeros: [G, O]; scales are those of float16.
        gram: [I, I], damped.
    """
    group_size = len(columns) // len(scales)
    starts = range(0, len(columns), group_size)
    change = (values - zeros.repeat_interleave(group_size, 0)) * scales.repeat_interleave(group_size, 0) - columns
    gradient = gram @ change
    for _ in range(NUM_SWEEPS):
        for scale, zero, start in zip(scales, zeros, starts, strict=True):
            group = slice(start, start + group_size)
            before, slope, curvature = change[group].clone(), gradient[group].clone(), gram[group, group]
            steps = values[group] - zero
            fitted = scale - (steps * slope).sum(0) / (steps * (curvature @ steps)).sum(0)
            # Also false for a group without steps, which is 0 / 0.
            scale.copy_(torch.where(fitted > 2**-24, fitted.half().float(), scale))
            change[group] = steps * scale - columns[group]
            slope += curvature @ (change[group] - before)
            for i in range(group_size):
                column, old = columns[start + i], change[start + i]
                best = column + old - slope[i] / curvature[i, i]
                values[start + i] = value = (best / scale).round_().add_(zero).clamp_(0, max_value)
                step = (value - zero) * scale - column - old
                slope.addr_(curvature[:, i], step)
                old += step
            gradient.addmm_(gram[:, group], change[group] - before)
