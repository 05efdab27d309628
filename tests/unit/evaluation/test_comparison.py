"""Intervals and differences: what is noise is not called better."""

from __future__ import annotations

import random

import pytest

from evaluation.comparison import Values, difference_of, failed_bounds, mean_of


def ones(*values: float) -> Values:
    return [(value, 1.0) for value in values]


def test_mean_is_weighted_and_in_its_interval() -> None:
    mean = mean_of([(1.0, 3.0), (0.0, 1.0)], seed=1)
    assert (mean.value, mean.count) == (0.75, 2) and 0 <= mean.low <= 0.75 <= mean.high <= 1
    assert mean_of(ones(0.5), seed=1) == mean_of(ones(0.5), seed=2)
    values = ones(*(1 / number for number in range(1, 20)))
    assert mean_of(values, 1) == mean_of(values, 1) != mean_of(values, 2)


def test_interval_of_a_share_is_that_of_the_normal_distribution() -> None:
    """Of 400 questions half are right: 0.5 +- 1.96 * sqrt(0.25 / 400)."""
    mean = mean_of(ones(*[0, 1] * 200), seed=0)
    assert (mean.low, mean.high) == (pytest.approx(0.451, abs=0.006), pytest.approx(0.549, abs=0.006))


def test_noise_is_no_progress_and_progress_on_the_same_questions_is_seen() -> None:
    draw = random.Random(0)
    values = [draw.random() for _ in range(100)]
    others = draw.sample(values, 100)
    assert difference_of("chrf", ones(*values), ones(*others), 0).verdict == "not shown"
    higher = ones(*(value + 0.01 for value in values))
    assert difference_of("chrf", higher, ones(*values), 0).verdict == "better"
    assert difference_of("chrf", ones(*values), higher, 0).verdict == "worse"
    assert difference_of("loss", higher, ones(*values), 0).verdict == "worse"
    assert difference_of("loss", ones(*values), ones(*values), 0).verdict == "not shown"


def test_failed_bounds() -> None:
    scores = {"exact_match": 0.75, "chrf": 0.5}
    assert failed_bounds(scores, {"exact_match": 0.75, "chrf": 0.4}) == []
    assert failed_bounds(scores, {"exact_match": 0.8, "call_name": 0.0}) == [
        "exact_match is 0.75, less than 0.8", "no answer has call_name",
    ]  # fmt: skip
