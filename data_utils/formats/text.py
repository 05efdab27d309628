"""Parse the format of plain text: records ``{"text": ...}``, and the parts of .txt files."""

from __future__ import annotations

from collections.abc import Iterable

from chat.turns import TEXT, Turn
from data_utils.schema import (
    WEIGHT_FIELDS,
    InvalidRecord,
    Notes,
    ParsedRecord,
    Record,
    parse_weight,
    short_repr,
)

TEXT_EXAMPLE = 'Write {"text": "..."}'


class TextPart(str):
    """A part of a text file, which is one document.

    Attributes:
        is_last: nothing of the document follows; other parts are not followed by the end of text.
    """

    is_last = True


def looks_like_text(record: Record) -> bool:
    return record.get("text") is not None


def text_fields(record: Record) -> Iterable[str]:
    """Return the fields of a record that ``parse_text`` reads."""
    return ("text", *WEIGHT_FIELDS)


def parse_text(record: Record, notes: Notes) -> ParsedRecord:
    """Parse a plain text, which keeps every character.

    Raises:
        InvalidRecord: the text is missing, no string or blank.
    """
    text = record.get("text")
    if not isinstance(text, str):
        what = f'"text" must be a string, not {short_repr(text)}' if "text" in record else 'the record has no "text"'
        raise InvalidRecord(what, TEXT_EXAMPLE)
    if not isinstance(text, TextPart) and not text.strip():
        raise InvalidRecord('"text" is empty', "Remove the record")
    return [Turn(TEXT, text, weight=parse_weight(record, "the record"))], ()


def is_continued(record: Record) -> bool:
    """Return whether the text of a record goes on in the next record of its file."""
    text = record.get("text")
    return isinstance(text, TextPart) and not text.is_last
