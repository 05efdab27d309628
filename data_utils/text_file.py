"""Long texts in parts: a .txt file is one document that is never held whole, and parts are tokenised one by one."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator

from data_utils.formats.text import TextPart
from data_utils.location import Location
from data_utils.other_files import check_encoding
from errors import DataError

PART = 1 << 20
"""Most characters of a part."""

# Where a text can be cut without changing its tokens (a line begins with text), or else before a space.
_LINE_START, _SPACE = re.compile(r"(?s:.*)\n(?=\S)"), re.compile(r"(?s:.*\S)(?=\s)")
_JSON = re.compile(rb'\s*(\{\s*"|\[\s*\{)')


def is_text_file(name: str, start: bytes, is_given: bool = False) -> bool:
    """Return whether a file is plain text: it is named .txt and does not begin like JSON.

    Args:
        start: its first bytes, unpacked.
        is_given: the user says that it is plain text, however it begins.
    """
    is_json = not is_given and _JSON.match(start.removeprefix(codecs.BOM_UTF8))
    return name.lower().endswith(".txt") and not is_json


def text_records(chunks: Iterator[bytes], path: str) -> Iterator[tuple[Location, object]]:
    """Yield the parts of a text as records, each with the line that it begins in. Line ends stay as they are.

    Args:
        chunks: the bytes of the text, no chunk empty; may start with the byte order mark of UTF-8.
        path: the file's name in locations and errors.

    Yields:
        A ``DataError`` as the last value, if the text is blank, not UTF-8 or no text.

    Raises:
        DataError: the chunks cannot be read.
    """
    text, line, is_blank = "", 1, True
    for more in _decoded(chunks, path):
        if isinstance(more, DataError):
            yield Location(path, line), more
            return
        text += more
        while len(text) > PART:
            end = _cut(text)
            part = TextPart(text[:end])
            part.is_last = False
            yield Location(path, line), {"text": part}
            line += part.count("\n")
            text, is_blank = text[end:], False
    where = Location(path, line)
    if is_blank and not text.strip():
        yield where, DataError(str(where), "the text is empty", "Leave the file out")
    else:
        yield where, {"text": TextPart(text)}


def parts_of(text: str) -> Iterator[str]:
    """Yield a text in parts."""
    while len(text) > PART:
        end = _cut(text)
        yield text[:end]
        text = text[end:]
    yield text


def _cut(text: str) -> int:
    """Return where a part ends: after a line, else before white space, else after ``PART`` characters."""
    match = _LINE_START.match(text, 0, PART) or _SPACE.match(text, 0, PART)
    return match.end() if match else PART


def _decoded(chunks: Iterator[bytes], path: str) -> Iterator[str | DataError]:
    """Yield the text, or its fault at last."""
    decoder, line, is_first = codecs.getincrementaldecoder("utf-8")(), 1, True
    try:
        for chunk in chunks:
            if is_first:
                try:
                    check_encoding(chunk, path)
                except DataError as error:
                    yield error
                    return
                chunk, is_first = chunk.removeprefix(codecs.BOM_UTF8), False
            text = decoder.decode(chunk)
            if "\0" in text:
                line += text[: text.index("\0")].count("\n")
                yield DataError(f"{path}:{line}", "contains a zero byte, so it is no text", "Leave the file out")
                return
            line += text.count("\n")
            yield text
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        line += error.object[: error.start].count(b"\n")
        byte = error.object[error.start]
        yield DataError(f"{path}:{line}", f"is not UTF-8 (byte 0x{byte:02x})", "Save the file as UTF-8")
