"""Perplexity of a text in windows of several lengths, by the variants of a model: what is measured and kept."""

from __future__ import annotations

import logging
import math
import sys
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints.rope import Yarn
from data_utils.encode import EncodeOptions, Encoder
from data_utils.files import data_files, read_records
from data_utils.formats import FORMATS
from errors import ConfigError, DataError
from evaluation.evaluating import Opened, Subject
from evaluation.kept import KeptRows, Key, Row
from evaluation.losses import TOKENS, window_losses
from evaluation.variants import Variants, use_variant
from loading.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

WINDOW_KEY = ("model", "variant", "length", "window")
"""What names the row of a window."""


class Windows:
    """Windows of a text, one after the other, without overlap.

    All lengths share the text that fills whole windows of the longest one, so that their perplexities are of the same
    text. Where a window is does not depend on the other lengths.

    Args:
        ids: of the text.
        lengths: tokens of a window.
        limit: most windows of the longest length.
        name: of the text, for the message.

    Attributes:
        tokens: of the text.
        used: tokens that the windows share.

    Raises:
        ConfigError: the text does not fill a window.
    """

    def __init__(self, ids: array[int], lengths: Sequence[int], limit: int | None, name: str) -> None:
        self.lengths, longest, self.tokens = sorted(set(lengths)), max(lengths), len(ids)
        if longest > self.tokens:
            fix = f"Give lengths up to {self.tokens}, or a longer text" if self.tokens > 1 else "Give a longer text"
            raise ConfigError(f"--lengths {longest}: {name} has {self.tokens:,} tokens", fix)
        count = self.tokens // longest
        self.used = longest * (count if limit is None else min(count, limit))
        self._ids = torch.tensor(ids[: self.used], dtype=torch.int64)

    def count(self, length: int) -> int:
        """Return the number of windows of a length."""
        return self.used // length

    def batch(self, length: int, numbers: Sequence[int]) -> Tensor:
        """Return windows of a length, [B, T]."""
        return torch.stack([self._ids[number * length : (number + 1) * length] for number in numbers])


def read_ids(checkpoint: Checkpoint, path: Path) -> array[int]:
    """Tokenise a text as plain text is trained: each document with the end of text behind it.

    Raises:
        DataError: no file, one that is not UTF-8 or empty, or a record without a text.
    """
    encoder = Encoder(checkpoint.tokenizer, checkpoint.family, EncodeOptions(sys.maxsize, needs_answer=False))
    encoder.prepare_for_many()
    ids = array("i")
    for file in data_files(path):
        for where, value in read_records(file, is_text=True):
            if isinstance(value, DataError):
                raise value
            document = FORMATS["text"].parse(value, where)
            encoder.check_conversation(document)
            for piece in encoder.encode(document):
                ids.extend(piece.input_ids)
    return ids


class Reading:
    """A model that reads windows by its variants.

    Args:
        yarn: of ``--rope_scaling``.
        any_base: see ``load_for_inference``.

    Raises:
        ConfigError: a checkpoint or an adapter that cannot be used.
    """

    def __init__(self, subject: Subject, yarn: Yarn | None, any_base: bool = False) -> None:
        self.opened = Opened(subject, any_base)
        self.variants = Variants(self.opened.checkpoint.folder, subject.adapter, yarn)

    def measure(
        self, windows: Windows, variants: Sequence[str], kept: KeptRows, on_tokens: Callable[[int], object]
    ) -> None:
        """Measure the losses that are not kept yet.

        Args:
            on_tokens: called with the number of tokens of the windows that have been measured.
        """
        cells = [(variant, length) for variant in variants for length in windows.lengths]
        missing = [cell for cell in cells if any(key not in kept.rows for key in self._keys(windows, *cell))]
        for variant, length in missing:
            self._measure_cell(windows, variant, length, kept, on_tokens)

    def _measure_cell(
        self, windows: Windows, variant: str, length: int, kept: KeptRows, on_tokens: Callable[[int], object]
    ) -> None:
        def compute(model: Any, numbers: Sequence[int]) -> list[Row]:
            losses = window_losses(model, windows.batch(length, numbers))
            return [{"targets": length - 1, "loss": loss} for loss in losses]

        use_variant(self.opened.model, self.variants.config(variant))
        asked = {key: int(key[-1]) for key in self._keys(windows, variant, length)}
        self.opened.add_missing(kept, asked, compute, lambda count: on_tokens(length * count), max(1, TOKENS // length))
        loss = math.fsum(kept.rows[key]["loss"] for key in asked) / ((length - 1) * len(asked))
        text = "%s, %s, %d tokens: perplexity %.4g of %d windows"
        logger.info(text, self.opened.label, variant, length, math.exp(min(loss, 700)), len(asked))

    def tokens(self, windows: Windows, variants: Sequence[str], kept: KeptRows) -> tuple[int, int]:
        """Return the tokens of all windows, and of those that are kept."""
        keys = [key for each in variants for length in windows.lengths for key in self._keys(windows, each, length)]
        return sum(int(key[2]) for key in keys), sum(int(key[2]) for key in keys if key in kept.rows)

    def _keys(self, windows: Windows, variant: str, length: int) -> list[Key]:
        """Return what names the rows of a cell."""
        return [(self.opened.label, variant, length, number) for number in range(windows.count(length))]


def common_ids(readings: Sequence[Reading], path: Path) -> array[int]:
    """Return the tokens of a text, which are the same for all models: a perplexity is per token.

    Raises:
        ConfigError: names a model with another tokenizer.
        DataError: a text that cannot be used.
    """
    first, *others = readings
    ids = read_ids(first.opened.checkpoint, path)
    model = first.opened.subject.model
    for other in (reading.opened for reading in others):
        if other.subject.model != model and read_ids(other.checkpoint, path) != ids:
            names = f"{path} are others than those of {model}"
            what = f"--against {other.subject.model}: its tokens of {names}"
            raise ConfigError(what, "Perplexities per token cannot be compared: evaluate the models one at a time")
    return ids


def common_variants(readings: Sequence[Reading], names: Sequence[str] | None) -> list[str]:
    """Return the variants of a table: those that were asked for, or all that the models share.

    Raises:
        ConfigError: a model lacks one, or a value that one needs.
    """
    if names is None:
        shared = [set(reading.variants.names) for reading in readings]
        names = [name for name in readings[0].variants.names if all(name in each for each in shared)]
    for reading in readings:
        reading.variants.check(names)
        for name in names:
            reading.variants.config(name)
    return list(names)
