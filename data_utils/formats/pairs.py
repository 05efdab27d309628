"""The formats with one question and its answer per record: ``alpaca`` and ``pairs``."""

from __future__ import annotations

from collections.abc import Iterable

from chat.turns import Turn
from data_utils.formats.tools import parse_tools
from data_utils.formats.turns import parse_message_list
from data_utils.schema import (
    SYSTEM_FIELDS,
    InvalidRecord,
    Notes,
    ParsedRecord,
    Record,
    is_empty,
    prepend_system,
    short_repr,
)

_PAIRS = (("prompt", "response"), ("prompt", "completion"), ("question", "answer"), ("query", "response"))
_RARE_PAIR = ("question", "response")  # read if there is no other pair
PAIRS = (*_PAIRS, _RARE_PAIR)
_SHARED_FIELDS = (*SYSTEM_FIELDS, "history", "tools", "functions")

ALPACA_EXAMPLE = 'Write {"instruction": "...", "input": "...", "output": "..."}'
PAIR_EXAMPLE = 'Write {"prompt": "...", "response": "..."}'
_STRING_FIX = 'Write the text as a string; a list of turns belongs in "messages"'


def looks_like_alpaca(record: Record) -> bool:
    return record.get("instruction") is not None and record.get("output") is not None


def alpaca_fields(record: Record) -> Iterable[str]:
    """Return the fields of a record that ``parse_alpaca`` reads."""
    return ("instruction", "input", "output", *_SHARED_FIELDS)


def parse_alpaca(record: Record, notes: Notes) -> ParsedRecord:
    """Parse a record in Alpaca's format. The question is the instruction and, on the next line, the input.

    Raises:
        InvalidRecord: the record does not have this format.
    """
    instruction = _text(record, "instruction", ALPACA_EXAMPLE)
    answer = _text(record, "output", ALPACA_EXAMPLE)
    input_ = "" if record.get("input") is None else _text(record, "input", ALPACA_EXAMPLE)
    question = f"{instruction}\n{input_}" if instruction and input_ else instruction or input_
    return _conversation(record, question, answer, notes)


def looks_like_pair(record: Record) -> bool:
    return bool(_pairs_in(record))


def pair_fields(record: Record) -> Iterable[str]:
    """Return the fields of a record that ``parse_pair`` reads."""
    return (*(name for pair in _pairs_in(record) for name in pair), *_SHARED_FIELDS)


def parse_pair(record: Record, notes: Notes) -> ParsedRecord:
    """Parse a question and an answer under one of the pairs of names in ``PAIRS``.

    Both may be lists of messages: only the second is trained, unless a turn has a weight of its own.

    Raises:
        InvalidRecord: no pair or several pairs, or a label of preference.
    """
    pairs = _pairs_in(record)
    if not pairs:
        known = ", ".join(f'"{question}" and "{answer}"' for question, answer in PAIRS)
        raise InvalidRecord(f"the record has no pair {known}, its fields are {short_repr(list(record))}", PAIR_EXAMPLE)
    if len(pairs) > 1:
        both = " and ".join(f'"{question}", "{answer}"' for question, answer in pairs)
        raise InvalidRecord(f"the record has several pairs: {both}", "Keep the one to train on")
    if isinstance(record.get("label"), bool):
        raise InvalidRecord(
            f'"label" ({record["label"]}) marks good and bad answers: preferences cannot be trained on',
            "Keep the records with good answers, and remove this field",
        )
    before, after = (record[name] for name in pairs[0])
    if isinstance(before, list) and isinstance(after, list):
        if not is_empty(record.get("history")):
            raise InvalidRecord(f'the record has "history" and a list "{pairs[0][0]}"', "Keep one of them")
        if not before + after:
            raise InvalidRecord(f'"{pairs[0][0]}" and "{pairs[0][1]}" are empty', "Remove the record")
        turns = parse_message_list(before + after, notes, untrained=len(before))
        return prepend_system(record, turns), parse_tools(record, notes)
    question, answer = (_text(record, name, PAIR_EXAMPLE) for name in pairs[0])
    return _conversation(record, question, answer, notes)


def _pairs_in(record: Record) -> list[tuple[str, str]]:
    for pairs in (_PAIRS, (_RARE_PAIR,)):
        if found := [pair for pair in pairs if all(record.get(name) is not None for name in pair)]:
            return found
    return []


def _conversation(record: Record, question: str, answer: str, notes: Notes) -> ParsedRecord:
    turns = [*_history(record), Turn("user", question), Turn("assistant", answer)]
    return prepend_system(record, turns), parse_tools(record, notes)


def _history(record: Record) -> list[Turn]:
    """Return the turns of earlier questions and answers."""
    history = record.get("history")
    if is_empty(history):
        return []
    fix = 'Write "history": [["question", "answer"], ...]'
    if not isinstance(history, list):
        raise InvalidRecord(f'"history" must be a list of [question, answer], not {short_repr(history)}', fix)
    turns = []
    for number, pair in enumerate(history, 1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise InvalidRecord(f'entry {number} of "history" must be two strings, not {short_repr(pair)}', fix)
        turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    return turns


def _text(record: Record, name: str, example: str) -> str:
    text = record.get(name)
    if isinstance(text, str):
        return text
    if name not in record:
        raise InvalidRecord(f'the record has no "{name}", its fields are {short_repr(list(record))}', example)
    raise InvalidRecord(f'"{name}" must be a string, not {short_repr(text)}', _STRING_FIX)
