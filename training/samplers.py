"""The order in which a run sees its examples; it depends on the seed and the epoch only.

So a run that resumes in the middle of an epoch continues in the same order, and all ranks draw the same one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler
from transformers import TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from chat.label_mask import IGNORE_INDEX
from data_utils.examples import ExampleSet

Order = Callable[[torch.Generator], list[int]]
"""Draws the indices of one epoch with the generator it is called with."""


class EpochSampler(Sampler[int]):
    """Every example once per epoch, followed by the blank ones.

    Args:
        order: draws the indices of an epoch.
        length: number of examples.
        seed: of the run; the epoch is added to it.
        padded_length: number of examples and blanks (``PaddedDataset``); blanks have the indices from ``length`` on.
    """

    def __init__(self, order: Order, length: int, seed: int, padded_length: int) -> None:
        self.order, self.length, self.padded_length, self.seed, self.epoch = order, length, padded_length, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.padded_length

    def __iter__(self) -> Iterator[int]:
        yield from self.order(torch.Generator().manual_seed(self.seed + self.epoch))
        yield from range(self.length, self.padded_length)


def build_sampler(
    args: TrainingArguments, data_mixing: str, examples: ExampleSet, padded_length: int
) -> EpochSampler | None:
    """Return the sampler of ``--data_mixing`` and ``--train_sampling_strategy``; ``None`` for other strategies."""
    if data_mixing == "sequential":
        order = by_source(examples.source_sizes)
    elif args.train_sampling_strategy == "random":
        order = shuffled(len(examples))
    elif args.train_sampling_strategy == "sequential":
        order = in_order(len(examples))
    elif args.train_sampling_strategy == "group_by_length":
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        order = grouped(examples.lengths, batch)
    else:
        return None
    seed = args.seed if args.data_seed is None else args.data_seed
    return EpochSampler(order, len(examples), seed, padded_length)


def shuffled(length: int) -> Order:
    """Return the order that shuffles all examples."""
    return lambda generator: torch.randperm(length, generator=generator).tolist()


def in_order(length: int) -> Order:
    """Return the order of the dataset itself."""
    return lambda generator: list(range(length))


def grouped(lengths: Sequence[int], group: int) -> Order:
    """Return the order that shuffles examples, with similar lengths within each group of ``group`` examples."""
    return lambda generator: get_length_grouped_indices(lengths, group, generator=generator)


def by_source(sizes: Sequence[int]) -> Order:
    """Return the order that takes one source after the other, each shuffled differently in every epoch.

    Args:
        sizes: number of examples per source, in the order of the dataset.
    """

    def order(generator: torch.Generator) -> list[int]:
        indices: list[int] = []
        for size in sizes:
            indices += (len(indices) + torch.randperm(size, generator=generator)).tolist()
        return indices

    return order


class PaddedDataset(Dataset[Any]):
    """Examples followed by blank ones: one token that is not a target, so that no figure changes.

    Padded to a multiple of the global batch, it gives every rank the same number of batches, and no example twice.
    """

    def __init__(self, examples: ExampleSet, multiple: int, token: int) -> None:
        self.examples = examples
        self.length = math.ceil(len(examples) / multiple) * multiple
        self.blank = {"input_ids": [token], "labels": [IGNORE_INDEX]}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self.examples[index] if index < len(self.examples) else self.blank
