"""Blocks of records, checked and tokenised: what several processes can do side by side."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from data_utils.encode import EncodedConversation, Encoder
from data_utils.formats import FORMATS, check_unambiguous, recognise
from data_utils.json_stream import JsonLine
from data_utils.location import Location
from data_utils.report.source_report import count_answers, digest_of
from data_utils.schema import Conversation
from data_utils.sources import fill_turns
from errors import DataError

Record = tuple[Location, object]
"""The location of a record and its value; the value is a ``JsonLine`` if it is not parsed yet."""


class EncodedRecord(NamedTuple):
    """What a report and a set need to know of a record.

    Attributes:
        pieces: its samples with their digests; if the first is not trained, ``skipped`` has the reason.
        fault: why it cannot be used; then there are no pieces.
        placeholders: the names of all that it contains.
        answers: number of its answers that may be trained, and how many of them are empty.
    """

    where: Location | str
    is_text: bool = False
    pieces: Sequence[tuple[EncodedConversation, bytes]] = ()
    fault: DataError | None = None
    skipped: str = ""
    placeholders: frozenset[str] = frozenset()
    answers: tuple[int, int] = (0, 0)
    notes: Sequence[str] = ()


class RecordEncoder:
    """Checks and tokenises blocks of records.

    Args:
        fill: replacements for ``{{name}}`` in messages.
        is_given: the format of the records was given, not recognised.
    """

    def __init__(self, encoder: Encoder, fill: Mapping[str, str], is_given: bool = False) -> None:
        self._encoder, self._fill, self._is_given = encoder, fill, is_given

    def check(self, format_name: str | None, records: Sequence[Record]) -> list[DataError | None]:
        """Return the fault of each record, if it has one."""
        faults: list[DataError | None] = []
        for where, value in records:
            try:
                self._encoder.check_conversation(_parse(format_name, where, value, self._is_given))
            except DataError as error:
                faults.append(error)
            else:
                faults.append(None)
        return faults

    def encode(self, format_name: str | None, records: Sequence[Record]) -> list[EncodedRecord]:
        """Tokenise records that ``check`` accepts."""
        return [self._encode(_parse(format_name, where, value)) for where, value in records]

    def _encode(self, conversation: Conversation) -> EncodedRecord:
        where, fill, encoder = conversation.where, self._fill, self._encoder
        turns, names = fill_turns(conversation.turns, fill)
        placeholders = frozenset(names)
        try:
            if placeholders & fill.keys():
                conversation = replace(conversation, turns=turns)
                encoder.check_conversation(conversation)  # again, because its texts have changed
            pieces = encoder.encode(conversation)
        except DataError as error:
            return EncodedRecord(where, fault=error, placeholders=placeholders)
        # As arrays, which are quick to digest, to write, and to send to another process.
        pieces = [
            EncodedConversation(array("i", piece.input_ids), piece.spans, piece.turns_dropped, piece.full_length)
            for piece in pieces
        ]
        if not pieces[0].trained_tokens:
            skipped = encoder.skip_reason(conversation, pieces[0])
            return EncodedRecord(where, conversation.is_text, [(pieces[0], b"")], None, skipped, placeholders)
        return EncodedRecord(
            where,
            conversation.is_text,
            [(piece, digest_of(piece)) for piece in pieces],
            placeholders=placeholders,
            answers=count_answers(conversation.turns),
            notes=encoder.notes(conversation),
        )


def _parse(format_name: str | None, where: Location, value: object, is_given: bool = True) -> Conversation:
    if isinstance(value, JsonLine):
        value = value.parse()
    if isinstance(value, DataError):
        raise value
    format_ = recognise(value, where) if format_name is None else FORMATS[format_name]
    if not is_given:
        check_unambiguous(value, where)
    return format_.parse(value, where)
