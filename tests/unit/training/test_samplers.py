"""The order of examples: complete in every epoch, and determined by seed and epoch."""

from __future__ import annotations

import pytest
import torch

from training.samplers import EpochSampler, Order, by_source, grouped, in_order, shuffled

LENGTHS = [7, 3, 9, 1, 5, 8, 2, 6, 4, 10]
ORDERS = {
    "shuffled": shuffled(10),
    "in_order": in_order(10),
    "grouped": grouped(LENGTHS, 2),
    "by_source": by_source([4, 0, 6]),
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_every_example_once_then_the_blanks(order: Order) -> None:
    sampler = EpochSampler(order, 10, seed=3, padded_length=12)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        indices = list(sampler)
        assert len(indices) == len(sampler) == 12
        assert sorted(indices[:10]) == list(range(10))
        assert indices[10:] == [10, 11]


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_the_order_depends_on_seed_and_epoch_alone(order: Order) -> None:
    sampler = EpochSampler(order, 10, seed=3, padded_length=10)
    first = list(sampler)
    torch.randn(5)  # other random numbers of a run
    assert list(sampler) == first
    again = EpochSampler(order, 10, seed=3, padded_length=10)
    sampler.set_epoch(2)
    again.set_epoch(2)
    assert list(sampler) == list(again)
    assert (list(sampler) == first) == (order is ORDERS["in_order"])


def test_shuffled_order_is_that_of_transformers() -> None:
    from accelerate.data_loader import SeedableRandomSampler

    theirs = SeedableRandomSampler(range(10), data_seed=42)
    theirs.set_epoch(1)
    ours = EpochSampler(shuffled(10), 10, seed=42, padded_length=10)
    ours.set_epoch(1)
    assert list(ours) == list(theirs)


def test_sources_are_not_mixed_and_groups_have_similar_lengths() -> None:
    indices = list(EpochSampler(ORDERS["by_source"], 10, seed=1, padded_length=10))
    assert sorted(indices[:4]) == list(range(4))
    indices = list(EpochSampler(grouped(LENGTHS, 5), 10, seed=1, padded_length=10))
    lengths = [LENGTHS[index] for index in indices]
    assert lengths[0] == 10  # the longest first, so that a lack of memory shows at once
