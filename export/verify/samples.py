"""What a merged model is asked: a few training samples of its adapters, or conversations of everyday topics."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from chat.label_mask import IGNORE_INDEX
from checkpoints.fold import WeightedAdapter
from checkpoints.training_samples import TrainingSamples
from export.verify.prompts import prompt_ids

logger = logging.getLogger(__name__)

MAX_TOKENS = 64
"""Tokens of all samples together, padding included: the time of a verification grows with them."""


@dataclass(frozen=True)
class Sample:
    """A conversation.

    Attributes:
        ids: its tokens.
        labels: as long as ``ids``: the id where the model's prediction counts, -100 elsewhere.
    """

    ids: list[int]
    labels: list[int]

    def cut(self, length: int) -> Sample:
        """Return at most ``length`` tokens: the first ones, or those around the start of an answer far from them."""
        first = next(position for position, label in enumerate(self.labels) if label != IGNORE_INDEX)
        start = 0 if first <= 3 * length // 4 else first - length // 2
        return Sample(self.ids[start : start + length], self.labels[start : start + length])


@dataclass(frozen=True)
class Samples:
    """Conversations to compare models on.

    Attributes:
        are_trained: they are training samples of the adapters.
    """

    items: tuple[Sample, ...]
    are_trained: bool

    def cut(self, length: int) -> Samples:
        """Return samples of at most ``length`` tokens each."""
        return Samples(tuple(sample.cut(length) for sample in self.items), self.are_trained)

    def __str__(self) -> str:
        count = f"{len(self.items)} training sample" if self.are_trained else f"{len(self.items)} everyday conversation"
        return count if len(self.items) == 1 else f"{count}s"


def choose_samples(adapters: Sequence[WeightedAdapter], merged: Path, vocab_size: int) -> Samples:
    """Return training samples that lie beside the adapters, else everyday conversations.

    Args:
        merged: folder whose tokenizer encodes the conversations.
        vocab_size: rows of the embedding; every id is smaller.
    """
    trained = [_trained(each.adapter.folder, vocab_size) for each in adapters]
    in_turn = (sample for samples in zip_longest(*trained) for sample in samples if sample is not None)
    if chosen := _fit(in_turn):
        return Samples(chosen, are_trained=True)
    # The first token has no prediction.
    everyday = (Sample(ids, [IGNORE_INDEX, *ids[1:]]) for ids in sorted(prompt_ids(merged, vocab_size), key=len))
    return Samples(_fit(everyday), are_trained=False)


def _trained(folder: Path, vocab_size: int) -> list[Sample]:
    """Return an adapter's samples, the shortest first."""
    samples = [
        Sample(sample.ids, [IGNORE_INDEX, *sample.labels[1:]])  # the first token has no prediction
        for sample in TrainingSamples.read(folder).samples
        if sample.ids
    ]
    fitting = [sample for sample in samples if _is_usable(sample, vocab_size)]
    if len(fitting) < len(samples):
        what = "%s: some of its training samples have ids beyond the model's %d rows, or labels that are not their ids"
        logger.warning(what, folder, vocab_size)
    with_targets = (sample for sample in fitting if any(label != IGNORE_INDEX for label in sample.labels))
    return sorted(with_targets, key=lambda sample: len(sample.ids))


def _is_usable(sample: Sample, vocab_size: int) -> bool:
    pairs = zip(sample.ids, sample.labels, strict=True)
    return all(0 <= id_ < vocab_size and label in (IGNORE_INDEX, id_) for id_, label in pairs)


def _fit(samples: Iterable[Sample]) -> tuple[Sample, ...]:
    """Return the first samples that are at most ``MAX_TOKENS`` together when padded to one length; at least one."""
    chosen: list[Sample] = []
    for sample in samples:
        lengths = [min(len(each.ids), MAX_TOKENS) for each in (*chosen, sample)]
        if max(lengths) * len(lengths) > MAX_TOKENS:
            break
        chosen.append(sample.cut(MAX_TOKENS))
    return tuple(chosen)
