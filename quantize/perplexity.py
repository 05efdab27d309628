"""Perplexity of held-out answers, and how much it changes from one model to another, with an interval."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

_QUANTILE = 1.96  # of the normal distribution, for an interval of 95 %


class Change(NamedTuple):
    """A relative change of the perplexity (0.1: a tenth more) and its interval of 95 %.

    Attributes:
        low, high: NaN if a single conversation was measured.
    """

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float | None]:
        """Return the values as JSON can express them."""
        return {name: None if math.isnan(value) else value for name, value in self._asdict().items()}

    def __str__(self) -> str:
        interval = "" if math.isnan(self.low) else f", 95 % interval {self.low:+.1%} to {self.high:+.1%}"
        return f"{self.value:+.1%}{interval}"


@dataclass(frozen=True)
class AnswerLosses:
    """Cross entropy of the answers of some conversations.

    Attributes:
        sums: summed over the answer tokens of each conversation.
        counts: answer tokens of each conversation.
    """

    sums: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return sum(self.counts)

    @property
    def perplexity(self) -> float:
        return math.exp(min(sum(self.sums) / self.num_tokens, 700.0))

    def change_from(self, other: AnswerLosses) -> Change:
        """Compare with the losses of another model on the same conversations.

        Conversations are drawn at random, not tokens, and most of what makes one of them difficult is so for both
        models. The interval is therefore that of a ratio of two means over conversations: of the difference of the
        losses, and of the number of tokens.
        """
        counts = torch.tensor(self.counts, dtype=torch.float64)
        differences = torch.tensor(self.sums, dtype=torch.float64) - torch.tensor(other.sums, dtype=torch.float64)
        mean, number = float(differences.sum() / counts.sum()), len(counts)
        margin = math.nan
        if number > 1:
            deviations = differences - mean * counts
            error = float(deviations.square().sum().sqrt() / counts.sum()) * math.sqrt(number / (number - 1))
            margin = _QUANTILE * error
        return Change(*(math.expm1(min(value, 700.0)) for value in (mean, mean - margin, mean + margin)))
