"""What a file gives when it is read in the plainest way."""

from __future__ import annotations

import gzip
import json
import re
import struct
import zlib
from array import array
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from chat.families import QWEN_V1
from data_utils.encode import EncodeOptions, Encoder
from data_utils.formats import Format, recognise
from errors import DataError
from qwen_model.tokenization_qwen import QWenTokenizer
from tests.encoding import check_and_encode, weights_of
from tests.fuzz_data.drafts import Record

TOKENIZER = Path(__file__).parents[1] / "references" / "qwen_v1_small" / "tiny-qwen-small"


At = tuple[int | None, int | None]
"""A place in a file: its line, its record."""

BAD = "bad"


class Unit(NamedTuple):
    """A record of a file; its value is ``BAD`` itself where it cannot be read."""

    at: At
    value: Any


class Sample(NamedTuple):
    """What is trained on: ids, and the weight of each as it reaches a batch."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]


class _Twice(Exception):
    pass


def _once(pairs: list[tuple[str, Any]]) -> Record:
    if len(dict(pairs)) < len(pairs):
        raise _Twice
    return dict(pairs)


def _value_of(text: bytes) -> Any:
    try:
        return json.loads(text.decode(), object_pairs_hook=_once)
    except (ValueError, RecursionError, _Twice):
        return BAD


def plain_units(data: bytes) -> tuple[list[Unit], bool]:
    """The records of a text file, and whether a fault hides what stands behind them."""
    if data.startswith(b"\x1f\x8b"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error, struct.error):
            return [], True
    data = data.removeprefix(b"\xef\xbb\xbf")
    if data.lstrip(b" \t\r\n").startswith(b"["):
        return _list_units(data.decode("utf-8", "surrogateescape"))
    lines = [(number, line.strip(b" \t\r\n")) for number, line in enumerate(data.split(b"\n"), 1)]
    units = [Unit((number, None), _value_of(line)) for number, line in lines if line]
    return units, not units


def _list_units(text: str) -> tuple[list[Unit], bool]:
    decoder, blank = json.JSONDecoder(), re.compile(r"[ \t\r\n]*")

    def next_letter(position: int) -> tuple[str, int]:
        position += len(blank.match(text, position)[0])  # type: ignore[index]
        return text[position : position + 1], position

    units: list[Unit] = []
    letter, position = ",", text.index("[")
    while letter == ",":
        _, position = next_letter(position + 1)
        try:
            _, end = decoder.raw_decode(text, position)
            source = text[position:end].encode("utf-8", "surrogateescape")
            source.decode()
        except (ValueError, RecursionError):
            return units, True
        units.append(Unit((text.count("\n", 0, position) + 1, len(units) + 1), _value_of(source)))
        letter, position = next_letter(end)
    return units, letter != "]" or next_letter(position + 1)[0] != ""


def row_units(rows: Iterable[Record]) -> list[Unit]:
    return [Unit((None, number), _without_nulls(row)) for number, row in enumerate(rows, 1)]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def expected(units: Sequence[Unit]) -> list[tuple[At, Sample | str]]:
    """What becomes of each record: its sample, ``BAD``, or why there is nothing to learn in it."""
    format_ = next((found for found in (_format_of(unit.value) for unit in units) if found), None)
    return [(unit.at, BAD if unit.value is BAD or format_ is None else _sample(unit.value, format_)) for unit in units]


def _format_of(value: Any) -> Format | None:
    try:
        return None if value is BAD else recognise(value, "")
    except DataError:
        return None


def _sample(value: Any, format_: Format) -> Sample | str:
    try:
        encoded = check_and_encode(encoder(), format_.parse(value, ""))
    except DataError:
        return BAD
    if not encoded.trained_tokens:
        return "nothing to learn"
    return Sample(tuple(encoded.input_ids), tuple(array("f", weights_of(encoded))))


@cache
def encoder() -> Encoder:
    return Encoder(QWenTokenizer.from_pretrained(TOKENIZER), QWEN_V1, EncodeOptions())
