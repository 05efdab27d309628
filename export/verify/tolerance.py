"""The difference that rounding explains, and the check of one part of a model against it.

Shapes: N tokens, M columns of a part's output (channels or vocabulary rows).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

FACTOR = 2.0
"""Allowed error per channel of a block's output, or row of embedding or head, as a multiple of the rounding error.

A correct merge rounds the very same numbers, so its error equals the rounding error (measured: up to 1.1 times). It
differs only where two orders of summation put a number on different sides of a tie; that changes the sign of the
error, not its size."""

SHARE = 0.5
"""Allowed distance of a whole part from the rounded weights, as a share of the rounding error.

In a correct merge only those few numbers contribute (measured: up to 0.14, in layers of 32 channels)."""

FLOOR = 1e-4
"""Additional error allowed for float32, as a share of the part's own contribution (measured: 3e-7, and 4e-5 if
attention is so sharp that it amplifies errors)."""

STATES_FLOOR = 1e-6
"""The same, as a share of the states that a block adds to: float32 rounds their sums."""

END_FACTOR = 4.0
END_FLOOR = 1e-3
"""The same two for the largest difference of logits, the second as a share of the largest logit: small errors grow
through many blocks."""


class States(NamedTuple):
    """States or outputs in three models: base with adapters, merged folder, and the first with rounded weights."""

    reference: Tensor
    merged: Tensor
    rounded: Tensor


class PartCheck:
    """Compares a part of the merged model with the reference and keeps the worst difference.

    Args:
        name: of the part.
        unit: what a column of its output is called.
    """

    def __init__(self, name: str, unit: str) -> None:
        self.name, self.unit = name, unit
        self._worst_excess, self._fault = 1.0, ""

    def compare(self, outputs: States, contribution: Tensor, first: int = 0) -> None:
        """Compare columns by the RMS of their differences over the rows.

        Args:
            outputs: the part's outputs for one input, [N, M].
            contribution: [N, M], what the part adds to its input; scales the error allowed for float32.
            first: index of the first column.
        """
        error, size = rms(outputs.merged - outputs.reference), rms(contribution)
        rounding, states = rms(outputs.rounded - outputs.reference), rms(outputs.reference)
        bound = FACTOR * rounding + FLOOR * (size + rms(size)) + STATES_FLOOR * states
        excess = torch.where(error == 0, 0, error / bound)
        excess = torch.where(bound.isfinite(), excess, math.inf).nan_to_num(math.inf)
        column = int(excess.argmax())
        if self._is_worst(float(excess[column])):
            self._fault = (
                f"{self.name}: {self.unit} {first + column} is off by {float(error[column]):.2g}, allowed "
                f"{float(bound[column]):.2g} (rounding explains {float(rounding[column]):.2g})"
            )
        distance = float(rms(rms(outputs.merged - outputs.rounded)))
        allowed = float(SHARE * rms(rounding) + FLOOR * rms(size) + STATES_FLOOR * rms(states))
        if distance and self._is_worst(distance / allowed if allowed else math.inf):
            self._fault = f"{self.name}: off by {distance:.2g} in addition to rounding, allowed {allowed:.2g}"

    def _is_worst(self, excess: float) -> bool:
        if excess <= self._worst_excess:
            return False
        self._worst_excess = excess
        return True

    def faults(self) -> list[str]:
        """Return the worst difference beyond the bounds, if there is one."""
        return [self._fault] if self._fault else []


class RunningArgmax:
    """The most likely next token at each of N positions, from logits that arrive in slices of the vocabulary."""

    def __init__(self, count: int) -> None:
        self.values, self.ids = torch.full((count,), -math.inf), torch.full((count,), -1)

    def update(self, logits: Tensor, start: int) -> None:
        """Add logits [N, rows] of the vocabulary rows from ``start`` on."""
        values, ids = logits.max(dim=-1)
        is_better = values > self.values
        self.values = torch.where(is_better, values, self.values)
        self.ids = torch.where(is_better, ids + start, self.ids)

    def agreement(self, other: RunningArgmax) -> float:
        """Return the share of positions with equal tokens."""
        return float((self.ids == other.ids).float().mean())


def rms(values: Tensor) -> Tensor:
    """Root mean square over the first dimension."""
    return values.square().mean(0).sqrt()
