"""The share of a learnt change that rounded weights contain.

For the change d of weights b and the rounded weights w, it is <w - b, d> / <d, d>. Rounding to nearest keeps nothing of
a change that is smaller than half of the distance between two 16-bit numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor


@dataclass
class Kept:
    """Sums over the weights of one or several tensors.

    Attributes:
        learnt: squares of the learnt changes.
        applied: products of the learnt and the written changes.
        moved, weights: numbers of weights whose written value is not the base's, and of all.
    """

    learnt: float = 0.0
    applied: float = 0.0
    moved: int = 0
    weights: int = 0

    @property
    def share(self) -> float:
        """The share of the change that is kept; 1 if nothing was learnt."""
        return self.applied / self.learnt if self.learnt else 1.0

    @property
    def moved_share(self) -> float:
        return self.moved / self.weights if self.weights else 0.0

    @classmethod
    def of(cls, before: Tensor, exact: Tensor, written: Tensor) -> Kept:
        """Measure some weights.

        Args:
            before, exact: without and with the learnt change; exact is float32.
            written: ``exact``, rounded.
        """
        before = before.to(exact.dtype)
        change, moved = (exact - before).flatten(), (written.to(exact.dtype) - before).flatten()
        learnt = float(change.dot(change))
        if not math.isfinite(learnt):  # beyond float32
            change, moved = change.double(), moved.double()
            learnt = float(change.dot(change))
        return cls(learnt, float(moved.dot(change)), int(moved.ne(0).count_nonzero()), moved.numel())

    @classmethod
    def sum(cls, parts: Iterable[Kept]) -> Kept:
        total = cls()
        for part in parts:
            total.learnt += part.learnt
            total.applied += part.applied
            total.moved += part.moved
            total.weights += part.weights
        return total

    def times(self, factor: int) -> Kept:
        """Return the sums over ``factor`` times as many weights like these."""
        return Kept(self.learnt * factor, self.applied * factor, self.moved * factor, self.weights * factor)
