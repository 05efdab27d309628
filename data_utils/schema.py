"""The format of a data file: which records it holds and what a record may be.

A file is one JSON list of records, or one record per line (JSON Lines)::

    {"id": "any", "conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello!"}]}

``human`` and ``gpt`` are other names of ``user`` and ``assistant``. A first turn from ``system`` is the sample's system
message. Keys that mean nothing here are ignored; what would silently change the training is refused.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from errors import DataError
from qwen_model.families import Turn

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}

_TOOL_ROLES = ("tool", "function", "function_call", "observation")
_TOOL_FIELDS = ("tools", "functions")
_NO_TOOLS = "[]"  # as files that keep their tools as JSON text say it
_TURN_FIELDS = ("tool_calls", "function_call", "reasoning_content")

_FORMAT = "A data file is UTF-8: one JSON list of conversations, or one JSON object per line"
_RECORD = 'Write {"conversations": [{"from": "user", "value": "..."}, {"from": "assistant", "value": "..."}]}'

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Conversation:
    """A checked record: its turns (a ``system`` turn only as the first) and the place it came from."""

    turns: tuple[Turn, ...]
    where: str


def parse_conversation(record: object, where: str, needs_answer: bool = False) -> Conversation:
    """Check one record of a data file.

    Args:
        record: a decoded JSON value.
        where: its place (``file.jsonl:12``), for messages and reports.
        needs_answer: whether a conversation without an assistant turn is refused.

    Raises:
        DataError: anything that is not a conversation, or asks for what is not supported yet.
    """
    if not isinstance(record, dict):
        raise DataError(where, f"a record must be an object, not {_shown(record)}", _RECORD)
    if "conversations" not in record:
        raise DataError(where, f'the record has no "conversations", its keys are {_shown(list(record))}', _RECORD)
    for field in _TOOL_FIELDS:
        if record.get(field) and record[field] != _NO_TOOLS:
            raise DataError(where, f"{field!r} in a record: tool calls are not supported yet", "Leave the record out")
    if record.get("system"):
        raise DataError(
            where,
            f'a "system" field ({_shown(record["system"])}) is not part of the format and would be ignored',
            'Make it the first turn: {"from": "system", "value": "..."}',
        )
    entries = record["conversations"]
    if not isinstance(entries, list):
        raise DataError(where, f'"conversations" must be a list of turns, not {_shown(entries)}', _RECORD)
    if not entries:
        raise DataError(where, '"conversations" is empty', "Give it at least one turn, or remove the record")
    turns = tuple(_parse_turn(entry, number, where) for number, entry in enumerate(entries, 1))
    if needs_answer and all(turn.role != "assistant" for turn in turns):
        raise DataError(where, "no turn is from the assistant, so there is nothing to learn", "Remove the record")
    return Conversation(turns, where)


def _parse_turn(entry: object, number: int, where: str) -> Turn:
    turn = f"turn {number}"
    if not isinstance(entry, dict):
        raise DataError(where, f"{turn} must be an object, not {_shown(entry)}", _RECORD)
    for key in ("from", "value"):
        if key not in entry:
            raise DataError(where, f'{turn} has no "{key}", its keys are {_shown(list(entry))}', _RECORD)
    for field in _TURN_FIELDS:
        if entry.get(field):
            what = "thinking is" if field == "reasoning_content" else "tool calls are"
            raise DataError(where, f"{field!r} in {turn}: {what} not supported yet", "Leave the record out")
    sender, value = entry["from"], entry["value"]
    if not isinstance(sender, str) or sender not in ROLES:
        if sender in _TOOL_ROLES:
            raise DataError(
                where, f"{turn} is from {sender!r}: tool calls are not supported yet", "Leave the record out"
            )
        known = ", ".join(ROLES)
        raise DataError(where, f"{turn} is from an unknown role, {_shown(sender)}", f"Known roles are {known}")
    if not isinstance(value, str):
        raise DataError(
            where, f'the "value" of {turn} must be a string, not {_shown(value)}', "Write the text as a string"
        )
    role = ROLES[sender]
    if role == "system" and number > 1:
        raise DataError(where, f"{turn} is from 'system'", "A system message can only be the first turn")
    return Turn(role, value)


def read_records(path: str | Path) -> Iterator[tuple[str, object]]:
    """Read the records of a data file, each with its place.

    What the file holds decides, not its name: a list if it starts with ``[``, otherwise an object per line (blank lines
    are skipped, a byte order mark is allowed).

    Yields:
        ``("file.json:12 (record 3)", value)`` from a list, ``("file.jsonl:12", value)`` from lines; line and record
        count from 1, the line is where the record starts.

    Raises:
        DataError: a file that is missing, unreadable, not UTF-8 or without records; broken JSON, as
            ``file:line:column``.
    """
    path = Path(path)
    if path.is_dir():
        raise DataError(str(path), "is a folder", "Name a .json or .jsonl file")
    try:
        with path.open("rb") as file:
            empty = True
            for record in _list_records(file, path) if _starts_list(file) else _line_records(file, path):
                empty = False
                yield record
    except FileNotFoundError:
        raise DataError(str(path), "no such file", "Check the path") from None
    except OSError as error:
        raise DataError(str(path), f"cannot be read ({error.strerror or error})") from None
    if empty:
        raise DataError(str(path), "the file holds no conversations", _FORMAT)


def _starts_list(file: BinaryIO) -> bool:
    head = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    file.seek(0)
    return head.startswith(b"[")


def _line_records(file: BinaryIO, path: Path) -> Iterator[tuple[str, object]]:
    offset = 0
    for number, line in enumerate(file, 1):
        # Without the line's end, behind which a broken line would be reported as a fault of the next one.
        text = _decode_utf8(line, path, number, offset).rstrip(" \t\r\n")
        offset += len(line)
        start = _skip_space(text, 0)
        if start == len(text):
            continue
        value, end = _decode_json(text, start, path, number)
        if _skip_space(text, end) < len(text):
            raise _broken_json(path, number, end + 1, "more than one JSON value on the line")
        yield f"{path}:{number}", value


def _list_records(file: BinaryIO, path: Path) -> Iterator[tuple[str, object]]:
    # Value by value rather than at once, because the decoder tells no positions and a record's line is worth knowing.
    text = _decode_utf8(file.read(), path, 1, 0)
    position = _skip_space(text, text.index("[") + 1)
    line, counted, number = 1, 0, 0
    closed = text.startswith("]", position)
    while not closed:
        line, counted, number = line + text.count("\n", counted, position), position, number + 1
        value, end = _decode_json(text, position, path, 1)
        yield f"{path}:{line} (record {number})", value
        end = _skip_space(text, end)
        closed = text.startswith("]", end)
        if not closed and not text.startswith(",", end):
            raise _broken_json(path, *_line_and_column(text, end), "expecting ',' or ']' after a record")
        position = end if closed else _skip_space(text, end + 1)
    position = _skip_space(text, position + 1)
    if position < len(text):
        raise _broken_json(path, *_line_and_column(text, position), "more text after the end of the list")


def _decode_utf8(data: bytes, path: Path, line: int, offset: int) -> str:
    try:
        return data.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        # The codec that eats the byte order mark counts from behind it.
        bom = len(codecs.BOM_UTF8) if offset == 0 and data.startswith(codecs.BOM_UTF8) else 0
        start = error.start + bom
        line += data.count(b"\n", 0, start)
        what = f"not UTF-8: byte 0x{data[start]:02x} at offset {offset + start}"
        raise DataError(f"{path}:{line}", what, "Save the file as UTF-8") from None


def _decode_json(text: str, position: int, path: Path, first_line: int) -> tuple[object, int]:
    try:
        return _DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        raise _broken_json(path, first_line + error.lineno - 1, error.colno, error.msg) from None
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, thousands of open brackets
        line, column = _line_and_column(text, position)
        raise _broken_json(path, first_line + line - 1, column, str(error)) from None


def _broken_json(path: Path, line: int, column: int, what: str) -> DataError:
    return DataError(f"{path}:{line}:{column}", f"not valid JSON: {what}", _FORMAT)


def _line_and_column(text: str, position: int) -> tuple[int, int]:
    return text.count("\n", 0, position) + 1, position - text.rfind("\n", 0, position)


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None, "the pattern matches the empty string"
    return match.end()


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
