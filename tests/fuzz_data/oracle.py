"""A second, simple reader of data files: Python's ``json`` and ``gzip`` on the whole file at once."""

from __future__ import annotations

import gzip
import json
import re
import struct
import zlib
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from data_utils.formats import Format, recognise
from errors import DataError
from tests.encoding import weights_of
from tests.fuzz_data.chat_formats import QWEN, ChatFormat, differences, encoder_of
from tests.fuzz_data.valid_files import Record

At = tuple[int | None, int | None]
"""A location in a file: line, record."""

BAD = "bad"


class RawRecord(NamedTuple):
    """A record of a file; the value is ``BAD`` if it cannot be read."""

    at: At
    value: Any


class Sample(NamedTuple):
    """A training sample: ids, and their weights as in a batch."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]


class _RepeatedKey(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> Record:
    if len(dict(pairs)) < len(pairs):
        raise _RepeatedKey
    return dict(pairs)


def _parse(text: bytes) -> Any:
    try:
        return json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError, _RepeatedKey):
        return BAD


def oracle_records(data: bytes) -> tuple[list[RawRecord], bool]:
    """Return the records of a text file, and whether nothing after them can be read."""
    if data.startswith(b"\x1f\x8b"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error, struct.error):
            return [], True
    data = data.removeprefix(b"\xef\xbb\xbf")
    text = data.decode("utf-8", "surrogateescape")
    start = data.lstrip(b" \t\r\n")[:1]
    if start == b"[":
        return _list_records(text, text.index("["))
    if start == b"{" and (wrapped := _wrapped_list(text)):
        return _list_records(text, wrapped, end="}")
    if start == b"{" and _spans_lines(data, text):
        return _list_records(text, text.index("{") - 1, separator="", end="")
    lines = [(number, line.strip(b" \t\r\n")) for number, line in enumerate(data.split(b"\n"), 1)]
    records = [RawRecord((number, None), _parse(line)) for number, line in lines if line]
    return records, not records


_SPACE = re.compile(r"[ \t\r\n]*")


def _next_character(text: str, position: int) -> tuple[str, int]:
    position += len(_SPACE.match(text, position)[0])  # type: ignore[index]
    return text[position : position + 1], position


def _list_records(text: str, position: int, separator: str = ",", end: str = "]") -> tuple[list[RawRecord], bool]:
    """Read the records of a list whose bracket is at a position, in an object if ``end`` is its brace; or of a text
    without separators, from after a position."""
    decoder = json.JSONDecoder()
    records: list[RawRecord] = []
    character = separator
    while True:
        first, position = _next_character(text, position + len(character or " "))
        if not separator and records and not first:
            return records, False
        try:
            _, stop = decoder.raw_decode(text, position)
            source = text[position:stop].encode("utf-8", "surrogateescape")
            source.decode()
        except (ValueError, RecursionError):
            return records, True
        records.append(RawRecord((text.count("\n", 0, position) + 1, len(records) + 1), _parse(source)))
        character, position = _next_character(text, stop)
        if not separator:
            character, position = "", position - 1
        elif character != separator:
            break
    if end == "}" and character == "]":
        character, position = _next_character(text, position + 1)
    return records, character != end or _next_character(text, position + 1)[0] != ""


def _wrapped_list(text: str) -> int | None:
    """Return the position of the list of records that is the only field of an object."""
    match = re.match(r'\s*\{\s*"\w+"\s*:\s*\[', text)
    try:
        value = json.loads(text) if match else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or len(value) != 1 or _format_of(value) is not None:
        return None
    [items] = value.values()
    return match.end() - 1 if match and items and _format_of(items[0]) is not None else None


def _spans_lines(data: bytes, text: str) -> bool:
    """Return whether a text starts with an object over several lines."""
    lines = [line.strip(b" \t\r") for line in data.split(b"\n") if line.strip(b" \t\r")]
    if _is_value(lines[0]) or len(lines) == 1 or (lines[1].startswith(b"{") and _is_value(lines[1])):
        return False
    end = text.index("\n", text.index("{"))
    _, second = _next_character(text, end)
    try:
        _, stop = json.JSONDecoder().raw_decode(text, text.index("{"))
    except json.JSONDecodeError as error:
        return error.pos > second
    except (ValueError, RecursionError):
        return True
    return stop > end or text[stop:end].strip() == ","


def _is_value(line: bytes) -> bool:
    try:
        json.loads(line.decode("utf-8", "surrogateescape"))
    except json.JSONDecodeError:
        return False
    except (ValueError, RecursionError):
        return True
    return True


def row_records(rows: Iterable[Record]) -> list[RawRecord]:
    return [RawRecord((None, number), _without_nulls(row)) for number, row in enumerate(rows, 1)]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def expected(
    records: Sequence[RawRecord], chat: ChatFormat = QWEN, findings: list[str] | None = None
) -> list[tuple[At, Sample | str]]:
    """Return the samples of each record, or instead of them ``BAD``, or why it has no trained tokens.

    Args:
        findings: is extended by what differs from the official chat template.
    """
    format_ = next((format_ for format_ in (_format_of(record.value) for record in records) if format_), None)
    return [
        (record.at, sample)
        for record in records
        for sample in ([BAD] if record.value is BAD or format_ is None else _samples(record, format_, chat, findings))
    ]


def _format_of(value: Any) -> Format | None:
    try:
        return None if value is BAD else recognise(value, "")
    except DataError:
        return None


def _samples(
    record: RawRecord, format_: Format, chat: ChatFormat, findings: list[str] | None
) -> Sequence[Sample | str]:
    encoder = encoder_of(chat)
    try:
        conversation = format_.parse(record.value, "")
        encoder.check_conversation(conversation)
        samples = encoder.encode(conversation)
    except DataError:
        return [BAD]
    if findings is not None:
        findings += [f"{record.at}: {difference}" for difference in differences(chat, conversation, samples)]
    kept = [
        Sample(tuple(each.input_ids), tuple(array("f", weights_of(each)))) for each in samples if each.trained_tokens
    ]
    return kept or ["no trained tokens"]
