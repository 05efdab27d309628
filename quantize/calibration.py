"""Sample the conversations that calibrate a quantised model, and those that measure its perplexity."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from data_utils.dataset import DataOptions, DataReader
from data_utils.encode import EncodedConversation, EncodeOptions, Encoder, UnweightedExample
from data_utils.sources import parse_source
from errors import DataError
from loading.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

HELD_OUT_SHARE = 0.1
"""Share of the samples on which the perplexity is measured."""


@dataclass(frozen=True)
class Samples:
    """Sampled conversations, tokenised as in training."""

    calibration: list[UnweightedExample]
    held_out: list[UnweightedExample]

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
    """Sample ``count`` conversations uniformly, and hold out a tenth of them (at least one).

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
        if i < count:
            drawn.append(conversation.encoded)
        elif (slot := random.randrange(i + 1)) < count:
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
    if len(drawn) < count:
        logger.warning("--samples %d: the data contains %d conversations, all are used", count, len(drawn))
    random.shuffle(drawn)
    examples: list[UnweightedExample] = [{"input_ids": each.input_ids, "labels": each.labels} for each in drawn]
    num_held_out = max(1, round(HELD_OUT_SHARE * len(examples)))
    return Samples(examples[num_held_out:], examples[:num_held_out])
