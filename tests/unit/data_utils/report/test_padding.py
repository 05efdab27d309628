"""The share of padding of each batching strategy."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

from data_utils.report.padding import STRATEGIES, padding_shares


def test_shares_of_fixed_padding_and_of_single_sample_batches() -> None:
    shares = padding_shares({10: 3, 30: 1}, max_length=40, batch_size=1)
    assert list(shares) == ["fixed", "dynamic", "grouped", "rows"] == list(STRATEGIES)
    assert shares["fixed"] == pytest.approx(1 - 60 / 160)
    assert (shares["dynamic"], shares["grouped"]) == (0, 0)
    assert padding_shares({}, max_length=40) == {}
    assert padding_shares({50: 2}, max_length=40)["fixed"] == 0  # a longer sample makes the rows longer


@pytest.mark.parametrize("batch_size", [2, 3, 7, 20])
def test_dynamic_share_equals_the_mean_over_all_batches(batch_size: int) -> None:
    lengths = [3, 3, 5, 8, 8, 8, 20]

    def expected(drawn: int) -> float:
        return float(np.mean([max(batch) for batch in combinations(lengths, drawn)])) if drawn else 0.0

    whole, rest = divmod(len(lengths), batch_size)
    computed = whole * batch_size * (expected(batch_size) if whole else 0.0) + rest * expected(rest)
    share = padding_shares(Counter(lengths), 64, batch_size)["dynamic"]
    assert share == pytest.approx(1 - sum(lengths) / computed)


@pytest.mark.parametrize(("count", "accumulation"), [(3000, 1), (3000, 4), (60, 2)])
def test_grouped_share_equals_transformers_sampler(count: int, accumulation: int) -> None:
    random_lengths = np.random.default_rng(3).lognormal(5, 1, count).astype(int) + 1
    lengths = random_lengths.tolist()
    shares = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        order = get_length_grouped_indices(lengths, 4 * accumulation, generator=generator)
        batches = [[lengths[index] for index in order[start : start + 4]] for start in range(0, count, 4)]
        shares.append(1 - sum(lengths) / sum(max(batch) * len(batch) for batch in batches))
    share = padding_shares(Counter(lengths), 8192, 4, accumulation)["grouped"]
    assert share == pytest.approx(np.mean(shares), abs=max(0.01, 3 * float(np.std(shares))))


def test_grouped_share_of_more_samples_than_are_simulated() -> None:
    few = padding_shares({100: 20_000, 200: 20_000, 900: 20_000}, 1000, 4)["grouped"]
    many = padding_shares({100: 2_000_000, 200: 2_000_000, 900: 2_000_000}, 1000, 4)["grouped"]
    assert 0 < few < 0.02
    assert many == pytest.approx(few, rel=0.2)
