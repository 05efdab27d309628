"""Records out of JSON as it streams in: one list of them, or one to a line. Never more than a record is held."""

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from errors import DataError

FORMAT = "A data file is UTF-8: one JSON list of conversations, or one JSON object per line"
MAX_RECORD_BYTES = 32 << 20
"""What a record, or the blank space between two, may take: more is a flood, such as a small .gz can hold."""

_MAX_BLANK_START = 1 << 20
_SPACE = b" \t\r\n"
_SPACES = re.compile(r"[ \t\r\n]*")
_NUMBER = frozenset("0123456789+-.eE")
# At this distance from the end of what is read so far, a word or an escape that is cut there looks broken or shorter.
_NEAR_END = 16
# The longer ones first: UTF-32 begins like UTF-16.
_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class Location(NamedTuple):
    """Where a record stands: ``a.jsonl:12``, ``a.json:12 (record 3)`` or ``a.parquet (record 7)``; all count from 1."""

    path: str
    line: int | None = None
    record: int | None = None

    def __str__(self) -> str:
        line = "" if self.line is None else f":{self.line}"
        record = "" if self.record is None else f" (record {self.record})"
        return f"{self.path}{line}{record}"


class _RepeatedKey(Exception):
    """Not a fault of the syntax: the record is refused, the text behind it can be read."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise _RepeatedKey(next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1))
    return members


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
_ANY_KEYS_DECODER = json.JSONDecoder()


def json_records(chunks: Iterator[bytes], path: str) -> Iterator[tuple[Location, object]]:
    """The records of a text: a list if it starts with ``[``, otherwise one value per line (blank lines are skipped).

    Args:
        chunks: the text's bytes, none of them empty. A byte order mark of UTF-8 is allowed.
        path: what places and faults call the file.

    Yields:
        A record's place and its value; a ``DataError`` in its stead where later records can be read.

    Raises:
        DataError: where nothing behind the fault can be read, as ``path:line:column``.
    """
    head = _read_head(chunks, path)
    for mark, encoding in _OTHER_MARKS.items():
        if head.startswith(mark):
            raise DataError(path, f"the file is {encoding}, not UTF-8", "Save the file as UTF-8")
    text = head.removeprefix(codecs.BOM_UTF8)
    chunks, offset = itertools.chain([text], chunks), len(head) - len(text)
    if text.lstrip(_SPACE).startswith(b"["):
        yield from _list_records(_ListText(chunks, path, offset), path)
    else:
        yield from _line_records(chunks, path, offset)


def _read_head(chunks: Iterator[bytes], path: str) -> bytes:
    """The start of a text, long enough to hold a byte order mark and the first character that is not blank."""
    head, most = bytearray(), min(_MAX_BLANK_START, MAX_RECORD_BYTES)
    for chunk in chunks:
        head += chunk
        if len(head) >= 4 and (head[:4] + chunk).strip(_SPACE + codecs.BOM_UTF8):
            break
        if len(head) > most:
            raise _too_long(path, 1, most)
    return bytes(head)


def _line_records(chunks: Iterator[bytes], path: str, offset: int) -> Iterator[tuple[Location, object]]:
    number = blank = 0  # lines that are passed, and bytes since the last one that was not blank
    for block in _whole_lines(chunks):
        if not block.strip(_SPACE):  # one by one, a flood of blank lines would take minutes
            number, offset, blank = number + block.count(b"\n"), offset + len(block), blank + len(block)
            if blank > MAX_RECORD_BYTES:
                raise _too_long(path, number)
            continue
        for line in block.removesuffix(b"\n").split(b"\n"):
            number += 1
            text = line.strip(_SPACE)
            blank = 0 if text else blank + len(line) + 1
            if max(blank, len(line)) > MAX_RECORD_BYTES:
                raise _too_long(path, number)
            if text:
                indent = len(line) - len(line.lstrip(_SPACE))
                place = Location(path, number)
                yield place, _line_value(text, place, indent, offset + indent)
            offset += len(line) + 1


def _whole_lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes in blocks that end where a line does, or somewhere in a line that is too long."""
    parts: list[bytes] = []
    held = 0
    for chunk in chunks:
        end = chunk.rfind(b"\n") + 1
        if end:
            yield b"".join([*parts, chunk[:end]])
            parts, held = [], 0
        parts.append(chunk[end:])
        held += len(chunk) - end
        if held > MAX_RECORD_BYTES:
            break
    yield b"".join(parts)


def _line_value(line: bytes, place: Location, indent: int, offset: int) -> object:
    """The value of a line from which the space around it was taken, or its fault."""
    try:
        text = line.decode()
        value, end = _decode(text, 0)
    except UnicodeDecodeError as error:
        return _not_utf8(str(place), line[error.start], offset + error.start)
    except json.JSONDecodeError as error:
        return _broken_json(f"{place}:{indent + error.pos + 1}", error.msg)
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, thousands of open brackets
        return _broken_json(f"{place}:{indent + 1}", str(error))
    if end < len(text):
        return _broken_json(f"{place}:{indent + end + 1}", "more than one JSON value on the line")
    return _checked(value, place)


def _list_records(text: _ListText, path: str) -> Iterator[tuple[Location, object]]:
    text.skip_space()
    text.position += 1
    closed = text.skip_space() == "]"
    record = 0
    while not closed:
        record += 1
        place = Location(path, text.line(), record)
        yield place, _checked(text.read_value(), place)
        separator = text.skip_space()
        closed = separator == "]"
        if not closed:
            if separator != ",":
                raise _broken_json(text.where(text.position), "expecting ',' or ']' after a record")
            text.position += 1
            text.skip_space()
    text.position += 1
    if text.skip_space():
        raise _broken_json(text.where(text.position), "more text after the end of the list")


class _ListText:
    """A text that is read from front to end, of which only what is not read yet is held.

    Attributes:
        position: where in the held text is being read.
    """

    def __init__(self, chunks: Iterator[bytes], path: str, offset: int) -> None:
        self.position = 0
        self._chunks, self._path = chunks, path
        self._offset = offset  # bytes given to the decoder, and what came before
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._bad_byte: tuple[int, int] | None = None  # itself and its offset, behind the held text
        self._ended = False
        self._held = ""
        self._counted, self._line = 0, 1  # a position that was passed, and its line
        self._dropped = 0  # characters of the held text's first line that are no longer held

    def line(self) -> int:
        """The line of the position."""
        self._line += self._held.count("\n", self._counted, self.position)
        self._counted = self.position
        return self._line

    def where(self, position: int) -> str:
        """``path:line:column`` of a place that is not passed yet."""
        line = self._line + self._held.count("\n", self._counted, position)
        return f"{self._path}:{line}:{self._chars_before(position) + 1}"

    def _chars_before(self, position: int) -> int:
        """How many characters stand before it on its line."""
        line_start = self._held.rfind("\n", 0, position) + 1
        return position - line_start + (0 if line_start else self._dropped)

    def skip_space(self) -> str:
        """Go to the next character that is not blank, and give it; an empty string at the end of the file."""
        skipped = 0
        while True:
            match = _SPACES.match(self._held, self.position)
            assert match is not None, "the pattern matches the empty string"
            skipped += match.end() - self.position
            self.position = match.end()
            if skipped > MAX_RECORD_BYTES:
                raise _too_long(self._path, self.line())
            if self.position < len(self._held) or not self._read_more():
                return self._held[self.position : self.position + 1]

    def read_value(self) -> object:
        """The JSON value at the position, which goes behind it."""
        while True:
            text, start = self._held, self.position
            try:
                value, end = _decode(text, start)
                if self._ended or end + _NEAR_END <= len(text):
                    break
            except json.JSONDecodeError as error:
                # A string without an end is named by its start, any other fault by the place where it shows.
                is_cut = error.pos + _NEAR_END > len(text) or error.msg.startswith("Unterminated string")
                if self._ended or not is_cut:
                    raise _broken_json(self.where(error.pos), error.msg) from None
            except (ValueError, RecursionError) as error:
                # A number with thousands of digits, unless it is cut here and goes on with a point; open brackets.
                if self._ended or isinstance(error, RecursionError) or text[-1] not in _NUMBER:
                    raise _broken_json(self.where(start), str(error)) from None
            if len(text) - start > MAX_RECORD_BYTES + _NEAR_END:
                raise _too_long(self._path, self.line())
            self._read_more()
        # A character takes up to four bytes.
        if 4 * (end - start) > MAX_RECORD_BYTES and len(text[start:end].encode()) > MAX_RECORD_BYTES:
            raise _too_long(self._path, self.line())
        self.position = end
        return value

    def _read_more(self) -> bool:
        """Let go of what is passed and hold more: twice as much, so that a long record is tried only a few times.

        Returns:
            Whether the file had not ended.
        """
        if self._bad_byte is not None:
            self.position = len(self._held)
            raise _not_utf8(f"{self._path}:{self.line()}", *self._bad_byte)
        if self._ended:
            return False
        self.line()
        self._dropped = self._chars_before(self.position)
        parts = [self._held[self.position :]]
        self.position = self._counted = 0
        held = len(parts[0])
        wanted = min(2 * held, MAX_RECORD_BYTES + _NEAR_END)
        while held <= wanted and not self._ended and self._bad_byte is None:
            parts.append(self._decode_chunk())
            held += len(parts[-1])
        self._held = "".join(parts)
        return True

    def _decode_chunk(self) -> str:
        chunk = next(self._chunks, b"")
        self._ended = not chunk
        start = self._offset - len(self._decoder.getstate()[0])
        self._offset += len(chunk)
        try:
            return self._decoder.decode(chunk, final=self._ended)
        except UnicodeDecodeError as error:
            self._bad_byte = error.object[error.start], start + error.start
            self._ended = False
            return error.object[: error.start].decode()


def _decode(text: str, position: int) -> tuple[object, int]:
    """A value and its end. For an object that has a key twice the value is a ``_RepeatedKey``."""
    try:
        return _DECODER.raw_decode(text, position)
    except _RepeatedKey as fault:
        return fault, _ANY_KEYS_DECODER.raw_decode(text, position)[1]


def _checked(value: object, place: Location) -> object:
    if not isinstance(value, _RepeatedKey):
        return value
    key = repr(value.args[0])
    shown = key if len(key) <= 60 else f"{key[:57]}..."
    return DataError(str(place), f"an object has the key {shown} more than once", "Keep one of them")


def _not_utf8(where: str, byte: int, offset: int) -> DataError:
    return DataError(where, f"not UTF-8: byte 0x{byte:02x} at offset {offset}", "Save the file as UTF-8")


def _broken_json(where: str, what: str) -> DataError:
    return DataError(where, f"not valid JSON: {what}", FORMAT)


def _too_long(path: str, line: int, most: int | None = None) -> DataError:
    most = most or MAX_RECORD_BYTES
    what = f"one record, or the blank space before it, takes more than {most / 2**20:g} MiB of text"
    return DataError(f"{path}:{line}", what, "Look whether the file is what it should be, or split the record")
