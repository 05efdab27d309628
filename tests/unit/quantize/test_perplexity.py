"""The interval of a change of the perplexity contains the true change as often as it says."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from quantize.perplexity import AnswerLosses

TRUE_CHANGE = 0.1  # of the mean loss


def losses_of(sums: Tensor, counts: Tensor) -> AnswerLosses:
    return AnswerLosses(tuple(sums.tolist()), tuple(counts.tolist()))


def test_interval_covers_the_true_change_in_95_of_100_draws() -> None:
    """Conversations differ in length and difficulty, and by how much their loss rises."""
    generator, covered, widths = torch.Generator().manual_seed(1), 0, []
    for _ in range(400):
        counts = torch.randint(5, 200, (40,), generator=generator)
        difficulty = 2 + 0.7 * torch.randn(40, generator=generator)
        rise = TRUE_CHANGE + 0.05 * torch.randn(40, generator=generator)
        before, after = losses_of(counts * difficulty, counts), losses_of(counts * (difficulty + rise), counts)
        change = after.change_from(before)
        assert change.value == pytest.approx(after.perplexity / before.perplexity - 1)
        covered += change.low < math.expm1(TRUE_CHANGE) < change.high
        widths.append(change.high - change.low)
    assert 0.91 <= covered / 400 <= 0.98
    # Not paired, the difficulty of the conversations would make it 0.5 wide.
    assert max(widths) < 0.1


def test_same_losses_give_no_change() -> None:
    losses = AnswerLosses((3.0, 8.0), (2, 4))
    assert losses.change_from(losses) == (0, 0, 0)
    assert losses.num_tokens == 6 and losses.perplexity == pytest.approx(math.exp(11 / 6))


def test_one_conversation_gives_no_interval() -> None:
    change = AnswerLosses((3.3,), (3,)).change_from(AnswerLosses((3.0,), (3,)))
    assert str(change) == "+10.5%"
    assert change.as_dict() == {"value": pytest.approx(0.10517, rel=1e-4), "low": None, "high": None}
