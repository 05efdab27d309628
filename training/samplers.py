"""The order in which a run sees its examples: by its seed and the epoch, and by nothing else.

So a run that is resumed in the middle of an epoch goes on in the same order, and all processes draw the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from chat.label_mask import IGNORE_INDEX
from data_utils.dataset import ExampleSet

Order = Callable[[torch.Generator], list[int]]


class EpochSampler(Sampler[int]):
    """Every example once in an epoch, and blank ones behind them.

    Args:
        order: the indices of an epoch, drawn with the generator that it is given.
        length: how many there are.
        seed: of the run; the epoch is added to it.
        filled: how many with the blanks (``PaddedDataset``), whose indices are those from ``length`` on.
    """

    def __init__(self, order: Order, length: int, seed: int, filled: int) -> None:
        self.order, self.length, self.filled, self.seed, self.epoch = order, length, filled, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.filled

    def __iter__(self) -> Iterator[int]:
        yield from self.order(torch.Generator().manual_seed(self.seed + self.epoch))
        yield from range(self.length, self.filled)


def mixed(length: int) -> Order:
    """All examples, shuffled."""
    return lambda generator: torch.randperm(length, generator=generator).tolist()


def as_given(length: int) -> Order:
    """All examples as they stand."""
    return lambda generator: list(range(length))


def grouped(lengths: Sequence[int], group: int) -> Order:
    """Shuffled, with examples of about the same length in each group of so many."""
    return lambda generator: get_length_grouped_indices(lengths, group, generator=generator)


def by_source(sizes: Sequence[int]) -> Order:
    """Every source's examples before those of the next, each source shuffled anew in every epoch.

    Args:
        sizes: examples of each source, in the order in which they stand in the dataset.
    """

    def order(generator: torch.Generator) -> list[int]:
        indices: list[int] = []
        for size in sizes:
            indices += (len(indices) + torch.randperm(size, generator=generator)).tolist()
        return indices

    return order


class PaddedDataset(Dataset[Any]):
    """Examples, and blanks behind them: a token that is no target, so no figure changes.

    Processes that get equally many batches from this neither wait for each other nor see an example twice.
    """

    def __init__(self, examples: ExampleSet, multiple: int, token: int) -> None:
        self.examples = examples
        self.length = math.ceil(len(examples) / multiple) * multiple
        self.blank = {"input_ids": [token], "labels": [IGNORE_INDEX]}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self.examples[index] if index < len(self.examples) else self.blank
