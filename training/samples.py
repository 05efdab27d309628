"""The training samples that a run keeps beside its result: ``training_samples.json``."""

from __future__ import annotations

import logging
import random
from pathlib import Path

from checkpoints.names import TRAINING_SAMPLES
from checkpoints.training_samples import TrainingSample, TrainingSamples
from data_utils.examples import ExampleSet

logger = logging.getLogger(__name__)

MAX_TOKENS = 512
"""Length of a sample that is kept: longer ones cost readers too much time."""

_MOST_TRIES = 1000  # examples of a part of the set that are looked at, among which all may be copies of one


def choose_samples(examples: ExampleSet, count: int, seed: int) -> TrainingSamples:
    """Choose different short examples with targets, one from each of ``count`` equal parts of the set.

    The choice depends on the examples, ``count`` and ``seed`` only. A small set has fewer than ``count``.
    """
    short = [index for index, length in enumerate(examples.lengths) if length <= MAX_TOKENS]
    draw = random.Random(seed)
    chosen: dict[tuple[int, ...], TrainingSample] = {}
    for part in range(count):
        indices = short[len(short) * part // count : len(short) * (part + 1) // count]
        first = draw.randrange(len(indices)) if indices else 0
        for index in (indices[first:] + indices[:first])[:_MOST_TRIES]:
            ids, labels = examples[index]["input_ids"], examples[index]["labels"]
            if tuple(ids) not in chosen and any(label >= 0 for label in labels[1:]):
                chosen[tuple(ids)] = TrainingSample(examples.where(index), ids, labels)
                break
    return TrainingSamples([*chosen.values()])


def keep_samples(examples: ExampleSet, count: int, seed: int, folder: Path) -> None:
    """Write ``training_samples.json`` and log what it contains; with ``count`` 0, remove that of an earlier start."""
    samples = choose_samples(examples, count, seed)
    samples.write(folder)
    if samples.samples:
        logger.info(
            "%s contains %d of your conversations; --keep_samples 0 leaves it out",
            TRAINING_SAMPLES, len(samples.samples),
        )  # fmt: skip
