"""The formats of data files: which one a record has, and record -> ``Conversation``; two of them also back.

A file's format is decided by its first record, and every record must fit it. A field that is ``null`` counts as absent
(tables know no other way of leaving one out).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chat.turns import Tool, Turn
from data_utils.formats import pairs, turns
from data_utils.schema import PREFERENCE_REFUSALS, RECORD_REFUSALS, Conversation, InvalidRecord, refuse, shown
from errors import DataError

if TYPE_CHECKING:
    from data_utils.files import Location

_SHOWN_RECORD = 300

Record = dict[str, Any]


@dataclass(frozen=True)
class Format:
    """One way of writing conversations.

    Attributes:
        name: as ``--data_format`` takes it.
        looks_for: what a record of it has, in one phrase.
        example: what to write, for messages.
        matches: whether a record has the fields of this format; cheap.
        read: the turns and tools of a record; raises ``InvalidRecord``.
        fields: names of a record's fields that ``read`` looks at.
        write: a record of a conversation and of other fields that it is to have; ``None`` where it is never written.
    """

    name: str
    looks_for: str
    example: str
    matches: Callable[[Record], bool]
    read: Callable[[Record], tuple[list[Turn], tuple[Tool, ...]]]
    fields: Callable[[Record], Iterable[str]]
    write: Callable[[Conversation, Record], Record] | None = None

    def fits(self, record: object) -> bool:
        """Whether a record has this format, judged by its fields and its first turn."""
        return isinstance(record, dict) and self.matches(record)

    def parse(self, record: object, where: Location | str) -> Conversation:
        """Check a record and read it.

        Args:
            record: a decoded JSON value.
            where: its place, for messages and reports.

        Raises:
            DataError: anything that is not of this format, or asks for what is not supported.
        """
        try:
            if not isinstance(record, dict):
                raise InvalidRecord(f"a record must be an object, not {shown(record)}", self.example)
            refuse(record, RECORD_REFUSALS, "the record")
            read_turns, tools = self.read(record)
        except InvalidRecord as unfit:
            raise DataError(str(where), f"{unfit.what} (read as {self.name})", unfit.fix) from None
        return Conversation(tuple(read_turns), where, tools)


# In the order in which they are tried: a record with a list of turns may also have a "prompt".
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
            turns.write_conversations,
        ),
        Format(
            "messages",
            'a list "messages" (or "conversations") of turns with "role" and "content"',
            turns.MESSAGES.example,
            lambda record: turns.looks_like(record, turns.MESSAGES),
            turns.parse_messages,
            turns.record_fields,
            turns.write_messages,
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
    )
}


def recognise(record: object, where: Location | str) -> Format:
    """The format of a record: the first of ``FORMATS`` that it fits.

    Raises:
        DataError: none; shows the record and what was looked for.
    """
    for format_ in FORMATS.values():
        if format_.fits(record):
            return format_
    if isinstance(record, dict):
        try:
            refuse(record, PREFERENCE_REFUSALS, "the record")
        except InvalidRecord as unfit:
            raise DataError(str(where), unfit.what, unfit.fix) from None
    looked_for = "; ".join(f"{format_.name}: {format_.looks_for}" for format_ in FORMATS.values())
    raise DataError(
        str(where), f"the record has no known format: {shown(record, _SHOWN_RECORD)}", f"Looked for {looked_for}"
    )
