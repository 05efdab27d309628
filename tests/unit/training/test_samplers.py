"""The order of examples: complete in every epoch, and determined by seed and epoch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from training.samplers import EpochSampler, Order, PackedExamples, PaddedDataset, by_source, grouped, in_order, shuffled

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


class Examples:
    """Stands for an ``ExampleSet`` of two sources."""

    lengths, source_sizes = LENGTHS, [4, 0, 6]

    def __init__(self, is_weighted: bool = False) -> None:
        self.is_weighted = is_weighted

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": [0] * self.lengths[index], "labels": [0] * self.lengths[index], "index": index}

    def where(self, index: int) -> str:
        return f"a.jsonl:{index + 1}"


@pytest.mark.parametrize("separate", [False, True])
def test_items_are_packs_of_whole_examples(separate: bool) -> None:
    examples: Any = Examples()
    packs = PackedExamples(examples, 10, by_source=separate)
    contents = [[example["index"] for example in packs[index]] for index in range(len(packs))]
    assert sorted(index for indices in contents for index in indices) == list(range(10))
    assert all(sum(LENGTHS[index] for index in indices) <= 10 for indices in contents)
    if separate:
        first = [indices for indices in contents if indices[0] < 4]
        assert packs.source_sizes == [len(first), 0, len(contents) - len(first)] and contents[: len(first)] == first
        assert all(index < 4 for indices in first for index in indices)
    else:
        assert packs.source_sizes == [6] == [len(packs)] and packs.fill == sum(LENGTHS) / 60
    assert packs[-1] == packs[len(packs) - 1] and packs.where(3) == "a.jsonl:4"


def test_blank_items_complete_the_batches_of_packs() -> None:
    examples: Any = Examples()
    padded = PaddedDataset(PackedExamples(examples, 10), 4, token=5)
    assert len(padded) == 8 and isinstance(padded[5], list)
    assert padded[6] == padded[7] == {"input_ids": [5], "labels": [-100]}
    weighted: Any = Examples(is_weighted=True)
    assert PaddedDataset(PackedExamples(weighted, 10), 4, token=5)[7] == {**padded[7], "loss_weights": [0.0]}
