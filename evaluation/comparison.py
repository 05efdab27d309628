"""Means with intervals, and differences of two models on the same questions, so that noise is not called progress.

Intervals are of the bootstrap: the questions are drawn anew, with repetition, 1,000 times by a seed, and 95 % of the
means lie in them. For a difference the same questions are drawn for both models, which is far more sensitive than two
intervals side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
LESS_IS_BETTER = ("loss", "false_positive")
_SHARE = 0.95

Values = Sequence[tuple[float, float]]
"""For each question a value and its weight: 1, or the targets of which a loss is the mean."""


@dataclass(frozen=True)
class Mean:
    """A mean with the interval in which 95 % of the resampled means lie."""

    value: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Difference(Mean):
    """The mean of one model less that of another.

    Attributes:
        verdict: ``better``, ``worse``, or ``not shown`` if 0 is in the interval.
    """

    verdict: str


def mean_of(values: Values, seed: int) -> Mean:
    """Return the weighted mean of values."""
    low, high = _interval(_resampled([values], seed)[0])
    return Mean(_mean(values), low, high, len(values))


def difference_of(name: str, values: Values, others: Values, seed: int) -> Difference:
    """Return how much values differ from others, question by question.

    Args:
        name: of the figure, which says whether more is better.
        others: of the same questions in the same order.
    """
    means, other_means = _resampled([values, others], seed)
    low, high = _interval(means - other_means)
    verdict = "not shown" if low <= 0 <= high else "better" if (low > 0) != (name in LESS_IS_BETTER) else "worse"
    return Difference(_mean(values) - _mean(others), low, high, len(values), verdict)


def _mean(values: Values) -> float:
    return sum(value * weight for value, weight in values) / sum(weight for _, weight in values)


def _resampled(columns: Sequence[Values], seed: int) -> list[np.ndarray]:
    """Return the resampled means of each column, all with the same draws of questions."""
    generator = np.random.default_rng(seed)
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]
    means = np.empty((len(arrays), RESAMPLES))
    for number in range(RESAMPLES):
        drawn = generator.integers(len(arrays[0]), size=len(arrays[0]))
        for row, array in zip(means, arrays, strict=True):
            row[number] = np.average(array[drawn, 0], weights=array[drawn, 1])
    return list(means)


def _interval(means: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - _SHARE) / 2, (1 + _SHARE) / 2])
    return float(low), float(high)


def failed_bounds(scores: Mapping[str, float], bounds: Mapping[str, float]) -> list[str]:
    """Return a sentence for each bound that a model does not reach: ``exact_match is 0.75, less than 0.8``."""
    return [
        f"{name} is {scores[name]:.4g}, less than {least:g}" if name in scores else f"no answer has {name}"
        for name, least in bounds.items()
        if scores.get(name, -1.0) < least
    ]
