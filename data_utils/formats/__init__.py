"""The formats of data files: recognise the format of a record and parse it to a ``Conversation``; two can also write.

The first record of a file decides its format, and all records must have it. A field that is ``null`` counts as absent,
because tables cannot leave a field out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from data_utils.formats import pairs, text, turns, writing
from data_utils.formats.tools import tool_names
from data_utils.schema import (
    SYSTEM_FIELDS,
    UNDECLARED_CALLS,
    UNSUPPORTED_IN_RECORDS,
    UNSUPPORTED_MEDIA,
    UNSUPPORTED_PREFERENCES,
    Conversation,
    InvalidRecord,
    Notes,
    ParsedRecord,
    Record,
    UnsupportedFields,
    check_unsupported,
    short_repr,
)
from errors import DataError

if TYPE_CHECKING:
    from chat.turns import Tool, Turn
    from data_utils.location import Location

_SHOWN_RECORD = 300
_ENDS_A_NAME = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029\"\\]")


@dataclass(frozen=True)
class Format:
    """A format of records.

    Attributes:
        name: its value for ``--data_format``.
        description: the fields of its records, in one phrase.
        example: a record, for messages.
        matches: return whether a record has the fields of this format; cheap.
        read: parse a record to turns and tools, and add to its notes; raises ``InvalidRecord``.
        fields: return the names of a record's fields that ``read`` uses.
        unsupported: fields that are refused.
        write: build a record from a conversation and other fields; ``None`` if the format cannot be written.
    """

    name: str
    description: str
    example: str
    matches: Callable[[Record], bool]
    read: Callable[[Record, Notes], ParsedRecord]
    fields: Callable[[Record], Iterable[str]]
    write: Callable[[Conversation, Record], Record] | None = None
    unsupported: UnsupportedFields = field(default_factory=lambda: UNSUPPORTED_IN_RECORDS)

    def fits(self, record: object) -> bool:
        """Return whether a record has this format, judged by its fields and its first turn."""
        return isinstance(record, dict) and self.matches(record)

    def parse(self, record: object, where: Location | str) -> Conversation:
        """Check and parse a record.

        Args:
            record: a decoded JSON value.
            where: its location, for messages and reports.

        Raises:
            DataError: the record does not have this format, or has unsupported fields.
        """
        try:
            if not isinstance(record, dict):
                raise InvalidRecord(f"a record must be an object, not {short_repr(record)}", self.example)
            check_unsupported(record, self.unsupported, "the record")
            notes: Notes = set()
            parsed_turns, tools = self.read(record, notes)
            names_functions = bool(tools) or any([turn.calls for turn in parsed_turns])
            if names_functions:
                _check_function_names(parsed_turns, tools)
        except InvalidRecord as error:
            raise DataError(str(where), f"{error.what} (read as {self.name})", error.fix) from None
        if names_functions and _calls_undeclared(parsed_turns, tools):
            notes.add(UNDECLARED_CALLS)
        return Conversation(tuple(parsed_turns), where, tools, tuple(sorted(notes)), text.is_continued(record))


def _check_function_names(turns: Sequence[Turn], tools: Sequence[Tool]) -> None:
    """Raise ``InvalidRecord`` for a name that would end the line or string in which a call names its function."""
    names = {call.name for turn in turns for call in turn.calls} | {name for tool in tools for name in tool_names(tool)}
    if bad := next((name for name in sorted(names) if _ENDS_A_NAME.search(name)), None):
        what = f"the function name {short_repr(bad)} contains a quotation mark, a backslash or a control character"
        raise InvalidRecord(what, "Rename the function")


def _calls_undeclared(turns: Iterable[Turn], tools: Iterable[Tool]) -> bool:
    called = {call.name for turn in turns for call in turn.calls}
    return bool(called) and not called <= {name for tool in tools for name in tool_names(tool)}


# In the order in which they are tried: a record with a list of turns may have a "prompt" as well.
FORMATS: dict[str, Format] = {
    format_.name: format_
    for format_ in (
        Format(
            "conversations",
            'a list "conversations" (or "messages") of turns with "from" and "value"',
            turns.CONVERSATIONS.example,
            lambda record: turns.looks_like(record, turns.CONVERSATIONS),
            turns.parse_conversations,
            turns.record_fields,
            writing.write_conversations,
        ),
        Format(
            "messages",
            'a list "messages" (or "conversations") of turns with "role" and "content"',
            turns.MESSAGES.example,
            lambda record: turns.looks_like(record, turns.MESSAGES),
            turns.parse_messages,
            turns.record_fields,
            writing.write_messages,
        ),
        Format(
            "alpaca",
            '"instruction" and "output"',
            pairs.ALPACA_EXAMPLE,
            pairs.looks_like_alpaca,
            pairs.parse_alpaca,
            pairs.alpaca_fields,
        ),
        Format(
            "pairs",
            " or ".join(f'"{question}" and "{answer}"' for question, answer in pairs.PAIRS),
            pairs.PAIR_EXAMPLE,
            pairs.looks_like_pair,
            pairs.parse_pair,
            pairs.pair_fields,
        ),
        Format(
            "text",
            '"text", a document',
            text.TEXT_EXAMPLE,
            text.looks_like_text,
            text.parse_text,
            text.text_fields,
            unsupported={**UNSUPPORTED_MEDIA, **UNSUPPORTED_PREFERENCES},
        ),
    )
}


FIELDS = frozenset(
    {
        *("conversations", "messages", "instruction", "input", "output", "history", "label"),
        *(name for pair in pairs.PAIRS for name in pair),
        "text",
        *("tools", "functions", *SYSTEM_FIELDS, *UNSUPPORTED_IN_RECORDS),
    }
)
"""Fields of a record that a format reads or refuses."""


def check_unambiguous(record: object, where: Location | str) -> None:
    """Check that a record has no list of turns beside a text.

    Alpaca's own files and some tables of pairs have a text as well, rendered from the other fields.

    Raises:
        DataError: it has.
    """
    if not isinstance(record, dict) or record.get("text") is None:
        return
    if name := next((name for name in ("conversations", "messages") if FORMATS[name].fits(record)), None):
        what = f'the record has a list of turns and "text" ({short_repr(record["text"])})'
        raise DataError(str(where), what, f"Give --data_format {name} or --data_format text")


def recognise(record: object, where: Location | str) -> Format:
    """Return the first of ``FORMATS`` that a record has.

    Raises:
        DataError: none of them, which shows the record and describes the formats; or a list of turns beside a text.
    """
    check_unambiguous(record, where)
    for format_ in FORMATS.values():
        if format_.fits(record):
            return format_
    if isinstance(record, dict):
        try:
            check_unsupported(record, UNSUPPORTED_PREFERENCES, "the record")
        except InvalidRecord as error:
            raise DataError(str(where), error.what, error.fix) from None
    looked_for = "; ".join(f"{format_.name}: {format_.description}" for format_ in FORMATS.values())
    raise DataError(
        str(where),
        f"the record has no known format: {short_repr(record, _SHOWN_RECORD)}",
        f"Looked for {looked_for}",
    )
