"""The layout of a text that starts with an object: a record per line, objects over several lines, or one wrapped list.

A wrapped list is ``{"data": [record, ...]}``, with other fields around it. The start of the text decides: up to the end
of the first object, or of the second line if the first is broken.
"""

from __future__ import annotations

import json
import re
from typing import Literal, NamedTuple

from data_utils.formats import FORMATS

LINES: Literal["lines"] = "lines"
VALUES: Literal["values"] = "values"

_SPACES = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()
# This close to the end of the text read so far, a truncated word or escape looks invalid or shorter than it is.
_NEAR_END = 16


class WrappedList(NamedTuple):
    """The list of records in an object.

    Attributes:
        field: its name.
        position: of the ``[``, in characters.
    """

    field: str
    position: int


class _Cut(Exception):
    """The text ends before the question can be answered."""


def is_record(value: object) -> bool:
    """Return whether a value is a record of any format."""
    return any(format_.fits(value) for format_ in FORMATS.values())


Layout = Literal["lines", "values"] | WrappedList


def find_layout(text: str, is_whole: bool) -> Layout | None:
    """Return the layout of a text whose first character that is not white space is ``{``.

    Args:
        text: the start of the file; bytes that are not UTF-8 as surrogates.
        is_whole: nothing follows it that could be read.

    Returns:
        ``None`` if more of the text is needed.
    """
    start = _skip(text, 0)
    try:
        fault, end = None, start
        try:
            value, end = _decode(text, start, is_whole)
        except ValueError as error:  # also an object that is larger than the largest record
            fault, wrapped = error, _find_list(text, start + 1, is_whole)
        else:
            wrapped = _find_list(text, start + 1, is_whole) if _wraps_records(value) else None
        if wrapped is not None:
            return wrapped
        return VALUES if _spans_lines(text, start, end, fault, is_whole) else LINES
    except _Cut:
        return None


def _wraps_records(value: object) -> bool:
    """Return whether an object is no record, but has a list of records."""
    if not isinstance(value, dict) or is_record(value):
        return False
    return any(isinstance(item, list) and item and is_record(item[0]) for item in value.values())


def _skip(text: str, position: int) -> int:
    match = _SPACES.match(text, position)
    assert match is not None, "the pattern matches the empty string"
    return match.end()


def _decode(text: str, position: int, is_whole: bool = False) -> tuple[object, int]:
    """Parse a value; return it and its end.

    Raises:
        ValueError: not JSON.
        _Cut: the text ends in the value.
    """
    try:
        value, end = _DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        # An unterminated string is reported at its start, any other fault where it occurs.
        is_cut = error.pos + _NEAR_END > len(text) or error.msg.startswith("Unterminated string")
        if is_cut and not is_whole:
            raise _Cut from None
        raise
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not is_whole and end + _NEAR_END > len(text):
        raise _Cut
    return value, end


def _find_list(text: str, position: int, is_whole: bool) -> WrappedList | None:
    """Return the first field that is a list of records, in an object whose fields start at a position."""
    try:
        return _first_list(text, position, is_whole)
    except ValueError:
        return None


def _first_list(text: str, position: int, is_whole: bool) -> WrappedList | None:
    while True:
        position = _skip(text, position)
        if text[position : position + 1] != '"':
            break
        name, position = _decode(text, position, is_whole)
        position = _skip(text, position)
        if text[position : position + 1] != ":":
            break
        position = _skip(text, position + 1)
        if text[position : position + 1] == "[":
            first = _skip(text, position + 1)
            if text[first : first + 1] == "{" and is_record(_decode(text, first, is_whole)[0]):
                return WrappedList(str(name), position)
        _, position = _decode(text, position, is_whole)
        position = _skip(text, position)
        if text[position : position + 1] != ",":
            break
        position += 1
    if position >= len(text) and not is_whole:
        raise _Cut
    return None


def _spans_lines(text: str, start: int, end: int, fault: ValueError | None, is_whole: bool) -> bool:
    """Return whether the first object is written over several lines, even if it is broken in a later one.

    Args:
        end: of the object.
        fault: why it cannot be read.
    """
    first, second_start = _line(text, start, is_whole)
    if _is_complete(first) or second_start == len(text):
        return False
    second, _ = _line(text, second_start, is_whole)
    if second.startswith("{") and _is_complete(second):
        return False
    if isinstance(fault, json.JSONDecodeError):
        return fault.pos > second_start
    # Without a position: too many levels or digits, but not within the first line.
    # A comma after it: objects on lines, as in a list.
    return fault is not None or end - start > len(first) or first[end - start :].strip() == ","


def _line(text: str, start: int, is_whole: bool) -> tuple[str, int]:
    """Return the stripped line at a position, and the start of the next one that is not blank."""
    end = text.find("\n", start)
    if end < 0:
        end = len(text)
    following = _skip(text, end)
    if following == len(text) and not is_whole:
        raise _Cut
    return text[start:end].rstrip(" \t\r"), following


def _is_complete(line: str) -> bool:
    """Return whether a line is one JSON value, or one that cannot be read for another reason than its end."""
    try:
        _, end = _DECODER.raw_decode(line)
    except json.JSONDecodeError:
        return False
    except (ValueError, RecursionError):
        return True
    return end == len(line)
