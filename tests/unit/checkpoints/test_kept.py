"""The share of a change that rounded weights contain."""

from __future__ import annotations

import math

import pytest
import torch

from checkpoints.kept import Kept

BASE = torch.tensor([1.0, 2.0, -4.0, 0.0])
CHANGE = torch.tensor([0.5, -1.0, 0.0, 2.0])


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e25])
def test_share_is_that_along_the_change_whatever_its_size(size: float) -> None:
    """Squares of 1e25 are beyond float32."""
    before, exact = BASE * size, (BASE + CHANGE) * size
    kept = Kept.of(before, exact, (BASE + CHANGE / 2) * size)
    assert kept.share == pytest.approx(0.5) and math.isfinite(kept.learnt)
    assert (kept.moved, kept.weights, kept.moved_share) == (3, 4, 0.75)
    assert Kept.of(before, exact, before).share == 0
    assert Kept.of(before, exact, exact).share == pytest.approx(1)


def test_sums_are_those_of_all_weights() -> None:
    none, all_ = Kept.of(BASE, BASE + CHANGE, BASE), Kept.of(BASE, BASE + CHANGE, BASE + CHANGE)
    total = Kept.sum([none, all_.times(3)])
    assert total.share == pytest.approx(0.75) and total.weights == 16
    assert Kept.of(BASE, BASE, BASE).share == 1
