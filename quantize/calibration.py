"""The conversations that a quantised model is fitted to, and those that it is judged by."""

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

HELD_OUT = 0.1
"""Share of the samples that the perplexity is measured on."""


@dataclass(frozen=True)
class Samples:
    """What was drawn, rendered as in training."""

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
    """RecordSampler ``count`` of the conversations, and a tenth of these (at least one) to hold out.

    Args:
        data_path: as ``--data_path`` gives them.

    Raises:
        ConfigError: a file that does not exist.
        DataError: records that cannot be used, or fewer than two conversations that can.
    """
    reader = DataReader(
        {"train": [parse_source(name) for name in data_path]},
        Encoder(checkpoint.tokenizer, checkpoint.family, encode_options),
        DataOptions(data_format=data_format, seed=seed),
        show_progress=show_progress,
    )
    random = Random(seed)
    drawn: list[EncodedConversation] = []
    # Each as likely, whatever their number (Vitter 1985, algorithm R).
    for number, taken in enumerate(reader.read()):
        if number < count:
            drawn.append(taken.encoded)
        elif (place := random.randrange(number + 1)) < count:
            drawn[place] = taken.encoded
    for source in reader.reports["train"].sources:
        for line in source.warnings():
            logger.warning("%s", line)
    if len(drawn) < 2:
        raise DataError(
            ", ".join(data_path),
            f"{len(drawn) or 'none'} of the conversations can be used, and 2 are the least: one to quantise with, one "
            "to measure with",
            "Give more data, or raise --model_max_length",
        )
    if len(drawn) < count:
        logger.warning("--samples %d: the data holds %d, and all of them are used", count, len(drawn))
    random.shuffle(drawn)
    examples: list[UnweightedExample] = [{"input_ids": each.input_ids, "labels": each.labels} for each in drawn]
    held = max(1, round(HELD_OUT * len(examples)))
    return Samples(examples[held:], examples[:held])
