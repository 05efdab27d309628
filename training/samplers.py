"""The items of a run (examples, or packs of them) and their order, which depends on the seed and the epoch only.

So a run that resumes in the middle of an epoch continues in the same order, and all ranks draw the same one.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from transformers import TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from chat.label_mask import IGNORE_INDEX
from data_utils.encode import Example
from data_utils.examples import ExampleSet
from data_utils.packing import Packs, pack

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
    args: TrainingArguments, data_mixing: str, examples: ExampleSet | PackedExamples, padded_length: int
) -> EpochSampler | None:
    """Return the sampler of ``--data_mixing`` and ``--train_sampling_strategy``; ``None`` for other strategies."""
    if data_mixing == "sequential":
        order = by_source(examples.source_sizes)
    elif args.train_sampling_strategy == "random":
        order = shuffled(len(examples))
    elif args.train_sampling_strategy == "sequential":
        order = in_order(len(examples))
    elif args.train_sampling_strategy == "group_by_length" and isinstance(examples, ExampleSet):
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


class PackedExamples(Dataset[Any]):
    """A dataset whose items are packs: lists of the examples of a set, each of them in one pack.

    Args:
        capacity: most tokens of a pack.
        by_source: pack each source by itself.

    Attributes:
        source_sizes: number of packs of each source, or of all sources as one; the packs are in this order.
        lengths: tokens of each pack.
        fill: share of the packs' capacity that samples take.
        is_weighted: the examples have ``loss_weights``.
    """

    def __init__(self, examples: ExampleSet, capacity: int, by_source: bool = False) -> None:
        self.examples, self.capacity, self.is_weighted = examples, capacity, examples.is_weighted
        lengths, start = np.asarray(examples.lengths, dtype=np.int64), 0
        parts: list[Packs] = []
        for size in examples.source_sizes if by_source else [len(examples)]:
            samples, starts = pack(lengths[start : start + size], capacity)
            parts.append(Packs(samples + start, starts[:-1] + start))
            start += size
        self.source_sizes = [len(part.starts) for part in parts]
        self._samples = np.concatenate([part.samples for part in parts])
        self._starts = np.concatenate([*(part.starts for part in parts), [start]])
        self.lengths: list[int] = np.add.reduceat(lengths[self._samples], self._starts[:-1]).tolist()
        self.fill = float(lengths.sum()) / (len(self) * capacity)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> list[Example]:
        index = range(len(self))[index]
        return [self.examples[int(sample)] for sample in self._samples[self._starts[index] : self._starts[index + 1]]]

    def where(self, sample: int) -> str:
        """Return the place of an example, by its index in the set."""
        return self.examples.where(sample)


class PaddedDataset(Dataset[Any]):
    """Items followed by blank ones: one token that is not a target, so that no figure changes.

    Padded to a multiple of the global batch, it gives every rank the same number of batches, and no example twice.

    Args:
        sizes: of parts that are padded each, so that no batch has items of two; by default all are one part.
    """

    def __init__(
        self, examples: ExampleSet | PackedExamples, multiple: int, token: int, sizes: Sequence[int] | None = None
    ) -> None:
        self.examples = examples
        self.sizes = [len(examples)] if sizes is None else list(sizes)
        self.ends = list(accumulate(math.ceil(size / multiple) * multiple for size in self.sizes))
        self.blank: dict[str, list[Any]] = {"input_ids": [token], "labels": [IGNORE_INDEX]}
        if examples.is_weighted:  # or a rank with blanks alone would count targets where the others sum weights
            self.blank["loss_weights"] = [0.0]

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Any:
        part = bisect_right(self.ends, range(len(self))[index])
        place = range(len(self))[index] - (self.ends[part - 1] if part else 0)
        return self.examples[sum(self.sizes[:part]) + place] if place < self.sizes[part] else self.blank
