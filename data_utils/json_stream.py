"""Read records from streamed JSON: one list, or one value per line. Only the current record is kept in memory.

Objects over several lines, and a list in an object, are read too; see ``json_layout``.
"""

from __future__ import annotations

import codecs
import itertools
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from data_utils.json_layout import VALUES, Layout, WrappedList, find_layout, is_record
from data_utils.location import Location
from data_utils.other_files import check_encoding
from data_utils.schema import short_repr
from errors import DataError

logger = logging.getLogger(__name__)

FORMAT = "A data file is UTF-8: one JSON list of conversations, or one JSON object per line"
MAX_RECORD_BYTES = 32 << 20
"""Largest record, and most white space between two records. A small .gz could otherwise expand without limit."""

_MAX_LEADING_SPACE = 1 << 20
_SPACE = b" \t\r\n"
_SPACES = re.compile(r"[ \t\r\n]*")
_NUMBER = frozenset("0123456789+-.eE")
# This close to the end of the text read so far, a truncated word or escape looks invalid or shorter than it is.
_NEAR_END = 16


class _RepeatedKey(Exception):
    """A key that occurs twice in an object. The record is invalid, but the text after it can be read."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise _RepeatedKey(next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1))
    return members


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
_ANY_KEYS_DECODER = json.JSONDecoder()


class JsonLine(NamedTuple):
    """A line that is not parsed yet: the same file is then read more quickly, and its lines by several processes.

    Attributes:
        text: without white space at its ends.
        indent: characters before it on the line.
        offset: bytes before it in the file.
    """

    text: bytes
    location: Location
    indent: int
    offset: int

    def parse(self) -> object:
        """Return the value, or its fault as a ``DataError``."""
        return _parse_line(self.text, self.location, self.indent, self.offset)


def json_records(chunks: Iterator[bytes], path: str, parses_lines: bool = True) -> Iterator[tuple[Location, object]]:
    """Yield the records of a text: of a list if it starts with ``[``, otherwise of every line that is not blank.

    If it starts with an object over several lines, or with a list of records in an object, these are read.

    Args:
        chunks: the bytes of the text, no chunk empty; may start with the byte order mark of UTF-8.
        path: the file's name in locations and errors.
        parses_lines: yield values; otherwise a record that is one line is a ``JsonLine``.

    Yields:
        The location and the value of a record; the value is a ``DataError`` if only this record cannot be read.

    Raises:
        DataError: nothing after the fault can be read; its location is ``path:line:column``.
    """
    head = _read_head(chunks, path)
    check_encoding(head, path)
    text = head.removeprefix(codecs.BOM_UTF8)
    offset = len(head) - len(text)
    start = text.lstrip(_SPACE)[:1]
    if start == b"{":
        layout, chunks = _find_layout(text, chunks)
    else:
        layout, chunks = None, itertools.chain([text], chunks)
    if start == b"[":
        yield from _list_records(_Text(chunks, path, offset), path)
    elif isinstance(layout, WrappedList):
        logger.info(f"{path}: the records are the list {short_repr(layout.field)} of one object")
        yield from _wrapped_records(_Text(chunks, path, offset), path, layout)
    elif layout == VALUES:
        yield from _value_records(_Text(chunks, path, offset), path)
    else:
        for line in _lines(chunks, path, offset):
            yield line.location, line.parse() if parses_lines else line


def _find_layout(text: bytes, chunks: Iterator[bytes]) -> tuple[Layout | None, Iterator[bytes]]:
    """Read on, twice as much each time, until the layout is known; return it, and all bytes from the start.

    A fault of the chunks is raised after what precedes it.
    """
    layout, is_whole = None, False
    while layout is None and not is_whole:
        wanted = min(2 * len(text), MAX_RECORD_BYTES + 1)
        parts, size = [text], len(text)
        while size < wanted and not is_whole:
            try:
                chunk = next(chunks, b"")
            except DataError as error:
                chunk, chunks = b"", _raising(error)
            is_whole = not chunk
            parts.append(chunk)
            size += len(chunk)
        text = b"".join(parts)
        is_whole = is_whole or size > MAX_RECORD_BYTES
        layout = find_layout(text.decode("utf-8", "surrogateescape"), is_whole)
    return layout, itertools.chain([text], chunks)


def _raising(error: DataError) -> Iterator[bytes]:
    raise error
    yield b""


def _read_head(chunks: Iterator[bytes], path: str) -> bytes:
    """Read the start of a text up to the chunk with its first character that is not white space."""
    head, limit = bytearray(), min(_MAX_LEADING_SPACE, MAX_RECORD_BYTES)
    for chunk in chunks:
        head += chunk
        if len(head) >= 4 and (head[:4] + chunk).strip(_SPACE + codecs.BOM_UTF8):
            break
        if len(head) > limit:
            raise _too_long(path, 1, limit)
    return bytes(head)


def _lines(chunks: Iterator[bytes], path: str, offset: int) -> Iterator[JsonLine]:
    number = blank = 0  # lines read; bytes since the last line that was not blank
    for block in complete_lines(chunks):
        if not block.strip(_SPACE):  # counted at once: millions of blank lines would take minutes one by one
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
                indent = 0 if line[0] not in _SPACE else len(line) - len(line.lstrip(_SPACE))
                yield JsonLine(text, Location(path, number), indent, offset + indent)
            offset += len(line) + 1


def complete_lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the bytes in blocks of complete lines. Reading stops in a line that is over the limit."""
    parts: list[bytes] = []
    size = 0
    for chunk in chunks:
        end = chunk.rfind(b"\n") + 1
        if end:
            yield b"".join([*parts, chunk[:end]])
            parts, size = [], 0
        parts.append(chunk[end:])
        size += len(chunk) - end
        if size > MAX_RECORD_BYTES:
            break
    yield b"".join(parts)


def _parse_line(line: bytes, location: Location, indent: int, offset: int) -> object:
    """Return the value of a stripped line, or its fault.

    Args:
        indent: characters before it on the line.
        offset: bytes before it in the file.
    """
    try:
        text = line.decode()
        value, end = _decode(text, 0)
    except UnicodeDecodeError as error:
        return _not_utf8(str(location), line[error.start], offset + error.start)
    except json.JSONDecodeError as error:
        return _broken_json(f"{location}:{indent + error.pos + 1}", error.msg)
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, thousands of open brackets
        return _broken_json(f"{location}:{indent + 1}", str(error))
    if end < len(text):
        return _broken_json(f"{location}:{indent + end + 1}", "more than one JSON value on the line")
    return _fault_if_repeated_key(value, location)


def _list_records(text: _Text, path: str) -> Iterator[tuple[Location, object]]:
    text.skip_space()
    yield from _items(text, path)
    if text.skip_space():
        raise _broken_json(text.where(text.position), "more text after the end of the list")


def _items(text: _Text, path: str) -> Iterator[tuple[Location, object]]:
    """Yield the records of the list that starts at the position, and move past it."""
    text.position += 1
    closed = text.skip_space() == "]"
    record = 0
    while not closed:
        record += 1
        location = Location(path, text.line(), record)
        yield location, _fault_if_repeated_key(text.read_value(), location)
        separator = text.skip_space()
        closed = separator == "]"
        if not closed:
            if separator != ",":
                raise _broken_json(text.where(text.position), "expecting ',' or ']' after a record")
            text.position += 1
            text.skip_space()
    text.position += 1


def _wrapped_records(text: _Text, path: str, wrapped: WrappedList) -> Iterator[tuple[Location, object]]:
    """Yield the records of a list in an object; its other fields are not used, but must not be such lists."""
    text.skip(wrapped.position)
    yield from _items(text, path)
    while text.skip_space() == ",":
        text.position += 1
        text.skip_space()
        line, field = text.line(), text.read_value()
        if not isinstance(field, str):
            raise _broken_json(text.where(text.position), "expecting the name of a field before this")
        if text.skip_space() != ":":
            raise _broken_json(text.where(text.position), "expecting ':' after the name of a field")
        text.position += 1
        text.skip_space()
        value = text.read_value()
        if isinstance(value, list) and value and is_record(value[0]):
            what = f"{short_repr(field)} is a second list of records, after {short_repr(wrapped.field)}"
            raise DataError(f"{path}:{line}", what, "Write each list to a file of its own")
    if text.skip_space() != "}":
        raise _broken_json(text.where(text.position), "expecting ',' or '}' after the list of records")
    text.position += 1
    if text.skip_space():
        raise _broken_json(text.where(text.position), "more text after the object with the list of records")


def _value_records(text: _Text, path: str) -> Iterator[tuple[Location, object]]:
    record = 0
    while start := text.skip_space():
        if start == "," and record:
            what = "a comma between objects that are in no list"
            raise DataError(text.where(text.position), what, "Put [ before the first object and ] after the last")
        record += 1
        location = Location(path, text.line(), record)
        yield location, _fault_if_repeated_key(text.read_value(), location)


class _Text:
    """The text of JSON values, read from front to end. Only a window of it is kept: the part not parsed yet.

    Attributes:
        position: the next character to parse, an index into the window.
    """

    def __init__(self, chunks: Iterator[bytes], path: str, offset: int) -> None:
        self.position = 0
        self._chunks, self._path = chunks, path
        self._offset = offset  # of the next chunk in the file, in bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._bad_byte: tuple[int, int] | None = None  # a byte after the window that is not UTF-8, and its offset
        self._ended = False
        self._window = ""
        self._counted, self._line = 0, 1  # an index into the window, and its line in the file
        self._dropped = 0  # characters of the window's first line that were removed from it

    def line(self) -> int:
        """Return the line of the position."""
        self._line += self._window.count("\n", self._counted, self.position)
        self._counted = self.position
        return self._line

    def where(self, position: int) -> str:
        """Return ``path:line:column`` of a position that is not before the current one."""
        line = self._line + self._window.count("\n", self._counted, position)
        return f"{self._path}:{line}:{self._chars_before(position) + 1}"

    def _chars_before(self, position: int) -> int:
        """Return the number of characters before it on its line."""
        line_start = self._window.rfind("\n", 0, position) + 1
        return position - line_start + (0 if line_start else self._dropped)

    def skip(self, count: int) -> None:
        """Move past so many characters."""
        while len(self._window) < count and self._read_more():
            pass
        self.position = count

    def skip_space(self) -> str:
        """Move to the next character that is not white space and return it; an empty string at the end of the file."""
        skipped = 0
        while True:
            match = _SPACES.match(self._window, self.position)
            assert match is not None, "the pattern matches the empty string"
            skipped += match.end() - self.position
            self.position = match.end()
            if skipped > MAX_RECORD_BYTES:
                raise _too_long(self._path, self.line())
            if self.position < len(self._window) or not self._read_more():
                return self._window[self.position : self.position + 1]

    def read_value(self) -> object:
        """Parse the JSON value at the position, and move past it."""
        while True:
            text, start = self._window, self.position
            try:
                value, end = _decode(text, start)
                if self._ended or end + _NEAR_END <= len(text):
                    break
            except json.JSONDecodeError as error:
                # An unterminated string is reported at its start, any other fault where it occurs.
                is_cut = error.pos + _NEAR_END > len(text) or error.msg.startswith("Unterminated string")
                if self._ended or not is_cut:
                    raise _broken_json(self.where(error.pos), error.msg) from None
            except (ValueError, RecursionError) as error:
                # A number with thousands of digits, unless the window ends in it and a decimal point may follow; or
                # nesting that is too deep.
                if self._ended or isinstance(error, RecursionError) or text[-1] not in _NUMBER:
                    raise _broken_json(self.where(start), str(error)) from None
            if len(text) - start > MAX_RECORD_BYTES + _NEAR_END:
                raise _too_long(self._path, self.line())
            self._read_more()
        # Encode only if needed: a character takes up to four bytes.
        if 4 * (end - start) > MAX_RECORD_BYTES and len(text[start:end].encode()) > MAX_RECORD_BYTES:
            raise _too_long(self._path, self.line())
        self.position = end
        return value

    def _read_more(self) -> bool:
        """Drop the parsed part of the window and double the rest, so that a long record is parsed only a few times.

        Returns:
            False at the end of the file.

        Raises:
            DataError: the next byte is not UTF-8.
        """
        if self._bad_byte is not None:
            self.position = len(self._window)
            raise _not_utf8(f"{self._path}:{self.line()}", *self._bad_byte)
        if self._ended:
            return False
        self.line()
        self._dropped = self._chars_before(self.position)
        parts = [self._window[self.position :]]
        self.position = self._counted = 0
        size = len(parts[0])
        wanted = min(2 * size, MAX_RECORD_BYTES + _NEAR_END)
        while size <= wanted and not self._ended and self._bad_byte is None:
            parts.append(self._decode_chunk())
            size += len(parts[-1])
        self._window = "".join(parts)
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
    """Parse a value; return it and its end. If an object has a repeated key, the value is a ``_RepeatedKey``."""
    try:
        return _DECODER.raw_decode(text, position)
    except _RepeatedKey as error:
        return error, _ANY_KEYS_DECODER.raw_decode(text, position)[1]


def _fault_if_repeated_key(value: object, location: Location) -> object:
    if not isinstance(value, _RepeatedKey):
        return value
    shown = short_repr(value.args[0])
    return DataError(str(location), f"an object has the key {shown} more than once", "Keep one of them")


def _not_utf8(where: str, byte: int, offset: int) -> DataError:
    return DataError(where, f"not UTF-8: byte 0x{byte:02x} at offset {offset}", "Save the file as UTF-8")


def _broken_json(where: str, what: str) -> DataError:
    return DataError(where, f"not valid JSON: {what}", FORMAT)


def _too_long(path: str, line: int, limit: int | None = None) -> DataError:
    limit = limit or MAX_RECORD_BYTES
    what = f"one record, or the white space before it, has more than {limit / 2**20:g} MiB of text"
    return DataError(f"{path}:{line}", what, "Check the file, or split the record; a document can be a .txt file")
