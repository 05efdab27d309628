"""Blocks of records, checked and tokenised: what several processes can do side by side."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace

from data_utils.blocks import EncodedBlock, Records
from data_utils.encode import Encoder
from data_utils.formats import FORMATS, check_unambiguous, recognise
from data_utils.json_stream import JsonLine
from data_utils.location import Location
from data_utils.report.samples import visible_line
from data_utils.report.source_report import count_answers, digest_of
from data_utils.schema import Conversation
from data_utils.sources import fill_turns
from errors import DataError

BAD_RECORD = "invalid record"
_MOST_SHOWN = 150  # characters of a path that is not shortened with any line and record


class RecordEncoder:
    """Checks and tokenises blocks of records.

    Args:
        fill: replacements for ``{{name}}`` in messages.
        is_given: the format of the records was given, not recognised.
    """

    def __init__(self, encoder: Encoder, fill: Mapping[str, str], is_given: bool = False) -> None:
        self._encoder, self._fill, self._is_given = encoder, fill, is_given

    def check(self, format_name: str | None, records: Records) -> tuple[bytearray, list[DataError]]:
        """Return for each record whether it can be used, and the faults of those that cannot."""
        usable = bytearray(len(records))
        faults: list[DataError] = []
        for index, (where, value) in enumerate(records):
            try:
                self._encoder.check_conversation(_parse(format_name, where, value, self._is_given))
                usable[index] = True
            except DataError as error:
                faults.append(error)
        return usable, faults

    def encode(
        self, format_name: str | None, records: Records, set_names: Sequence[str], copies: Sequence[int]
    ) -> EncodedBlock:
        """Tokenise records of one file.

        Args:
            set_names: the set that each record belongs to.
            copies: how often each is used there; 0 for those that ``check`` does not accept.
        """
        block = EncodedBlock(records[0][0].path)
        self._shown_path = visible_line(block.path) if len(block.path) <= _MOST_SHOWN else None
        for (where, value), set_name, count in zip(records, set_names, copies, strict=True):
            if count:
                self._encode(_parse(format_name, where, value), where, set_name, count, block)
            else:
                block.report_of(set_name).skip(where, BAD_RECORD)
        return block.finish()

    def _encode(
        self, conversation: Conversation, where: Location, set_name: str, copies: int, block: EncodedBlock
    ) -> None:
        """Tokenise a conversation, and add it to a block and its counts."""
        fill, encoder, report = self._fill, self._encoder, block.report_of(set_name)
        turns, names = fill_turns(conversation.turns, fill)
        block.placeholders |= names
        try:
            if names and names & fill.keys():
                conversation = replace(conversation, turns=turns)
                encoder.check_conversation(conversation)  # again, because its texts have changed
            pieces = encoder.encode(conversation)
        except DataError as error:
            block.faults.append(error)
            report.skip(where, BAD_RECORD, copies)
            return
        kept = [piece for piece in pieces if piece.trained_tokens]
        if full_length := max([piece.full_length for piece in pieces]):
            report.count_too_long(full_length, max((len(piece.input_ids) for piece in kept), default=0), copies)
        if not kept:
            shortened = (piece for piece in pieces if piece.turns_dropped)
            report.skip(where, encoder.skip_reason(conversation, next(shortened, pieces[0])), copies)
            return
        block.is_text |= conversation.is_text
        location = self._show(where)
        is_shortened = any([piece.turns_dropped for piece in pieces])
        if not conversation.is_text:
            report.count_samples(kept, copies)
        for piece in kept:
            if piece is kept[0]:
                report.keep(
                    where,
                    piece,
                    sorted(names - fill.keys()) if names else (),
                    copies,
                    answers=count_answers(conversation.turns),
                    truncated=f"longer than --model_max_length {encoder.options.max_length}" if is_shortened else None,
                    notes=encoder.notes(conversation),
                )
            else:
                report.keep(where, piece, copies=copies, is_first=False)
            ids = array("i", piece.input_ids)
            block.add(ids, piece, set_name, copies, where, digest_of(ids, piece.spans), location)

    def _show(self, where: Location) -> str:
        """Return a location as one visible line."""
        return visible_line(where) if self._shown_path is None else self._shown_path + str(where)[len(where.path) :]


def _parse(format_name: str | None, where: Location, value: object, is_given: bool = True) -> Conversation:
    if isinstance(value, JsonLine):
        value = value.parse()
    if isinstance(value, DataError):
        raise value
    format_ = recognise(value, where) if format_name is None else FORMATS[format_name]
    if not is_given:
        check_unambiguous(value, where)
    return format_.parse(value, where)
