"""Sample the conversations that calibrate a quantised model, and those that measure its perplexity."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from chat.label_mask import IGNORE_INDEX
from data_utils.dataset import DataOptions, DataReader
from data_utils.encode import EncodedConversation, EncodeOptions, Encoder, UnweightedExample
from data_utils.sources import parse_source
from errors import DataError
from loading.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

HELD_OUT_TOKENS = 2000
"""Answer tokens on which the perplexity is measured, if there are so many: fewer leave its change to chance."""
_MAX_HELD_OUT = 0.25  # share of the conversations, where they are too few to calibrate with all that were asked for


@dataclass(frozen=True)
class Samples:
    """Sampled conversations, tokenised as in training; none is in both lists."""

    calibration: list[UnweightedExample]
    held_out: list[UnweightedExample]

    @property
    def held_out_tokens(self) -> int:
        return sum(map(_count_targets, self.held_out))

    @property
    def calibration_tokens(self) -> int:
        return sum(len(example["input_ids"]) for example in self.calibration)


def draw_samples(
    checkpoint: Checkpoint,
    data_path: Sequence[str],
    count: int,
    encode_options: EncodeOptions,
    data_format: str,
    seed: int,
    show_progress: bool = True,
) -> Samples:
    """Sample up to ``count`` conversations uniformly to calibrate with, and hold out others.

    Held out are as many as have ``HELD_OUT_TOKENS`` answer tokens, at most ``count``. If there are not enough for both,
    a quarter of all is held out at most, and one at least.

    Args:
        data_path: values of ``--data_path``.

    Raises:
        ConfigError: a file does not exist.
        DataError: invalid records, or fewer than two usable conversations.
    """
    reader = DataReader(
        {"train": [parse_source(name) for name in data_path]},
        Encoder(checkpoint.tokenizer, checkpoint.family, encode_options),
        DataOptions(data_format=data_format, seed=seed),
        show_progress=show_progress,
    )
    random = Random(seed)
    drawn: list[EncodedConversation] = []
    # Reservoir sampling (Vitter 1985, algorithm R): uniform, without knowing the number of conversations.
    for i, conversation in enumerate(reader.read()):
        if i < 2 * count:
            drawn.append(conversation.encoded)
        elif (slot := random.randrange(i + 1)) < 2 * count:
            drawn[slot] = conversation.encoded
    for source in reader.reports["train"].sources:
        for line in source.warnings():
            logger.warning("%s", line)
    if len(drawn) < 2:
        raise DataError(
            ", ".join(data_path),
            f"{len(drawn) or 'none'} of the conversations can be used, at least 2 are needed: one to calibrate and one "
            "to measure the perplexity",
            "Give more data, or raise --model_max_length",
        )
    random.shuffle(drawn)
    examples: list[UnweightedExample] = [{"input_ids": list(each.input_ids), "labels": each.labels} for each in drawn]
    limit, num_tokens, num_held_out = max(len(examples) - count, int(_MAX_HELD_OUT * len(examples)), 1), 0, 0
    while num_held_out < limit and num_tokens < HELD_OUT_TOKENS:
        num_tokens += _count_targets(examples[num_held_out])
        num_held_out += 1
    samples = Samples(examples[num_held_out : num_held_out + count], examples[:num_held_out])
    if len(samples.calibration) < count:
        logger.warning(
            "--samples %d: the data contains %d conversations, %d calibrate and the others are held out",
            count, len(examples), len(samples.calibration),
        )  # fmt: skip
    return samples


def _count_targets(example: UnweightedExample) -> int:
    return sum(label != IGNORE_INDEX for label in example["labels"][1:])
