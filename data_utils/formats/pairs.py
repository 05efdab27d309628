"""The two formats whose records hold one question and its answer: ``alpaca`` and ``pairs``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from chat.turns import Tool, Turn
from data_utils.formats.tools import parse_tools
from data_utils.schema import InvalidRecord, is_empty, shown, with_system

Record = dict[str, Any]
Parsed = tuple[list[Turn], tuple[Tool, ...]]

PAIRS = (("prompt", "response"), ("prompt", "completion"), ("question", "answer"), ("query", "response"))
_SHARED_FIELDS = ("system", "history", "tools", "functions")

ALPACA_EXAMPLE = 'Write {"instruction": "...", "input": "...", "output": "..."}'
PAIR_EXAMPLE = 'Write {"prompt": "...", "response": "..."}'
_STRING_FIX = 'Write the text as a string; a list of turns belongs into "messages"'


def looks_like_alpaca(record: Record) -> bool:
    return record.get("instruction") is not None and record.get("output") is not None


def alpaca_fields(record: Record) -> Iterable[str]:
    """The fields of a record that ``parse_alpaca`` reads."""
    return ("instruction", "input", "output", *_SHARED_FIELDS)


def parse_alpaca(record: Record) -> Parsed:
    """Alpaca's format. The question is the instruction and, on the next line, the input.

    Raises:
        InvalidRecord: anything else.
    """
    instruction = _text(record, "instruction", ALPACA_EXAMPLE)
    answer = _text(record, "output", ALPACA_EXAMPLE)
    given = "" if record.get("input") is None else _text(record, "input", ALPACA_EXAMPLE)
    question = f"{instruction}\n{given}" if instruction and given else instruction or given
    return _parsed(record, question, answer)


def looks_like_pair(record: Record) -> bool:
    return bool(_pairs_in(record))


def pair_fields(record: Record) -> Iterable[str]:
    """The fields of a record that ``parse_pair`` reads."""
    return (*(name for pair in _pairs_in(record) for name in pair), *_SHARED_FIELDS)


def parse_pair(record: Record) -> Parsed:
    """A question and an answer under one of the names in ``PAIRS``.

    Raises:
        InvalidRecord: anything else, or two pairs.
    """
    pairs = _pairs_in(record)
    if not pairs:
        known = ", ".join(f'"{question}" and "{answer}"' for question, answer in PAIRS)
        raise InvalidRecord(f"the record has no pair {known}, its fields are {shown(list(record))}", PAIR_EXAMPLE)
    if len(pairs) > 1:
        both = " and ".join(f'"{question}", "{answer}"' for question, answer in pairs)
        raise InvalidRecord(f"the record has several pairs: {both}", "Keep the one to train on")
    if isinstance(record.get("label"), bool):
        raise InvalidRecord(
            f'"label" ({record["label"]}) says whether the answer is wanted: preferences cannot be trained on',
            "Keep the records with wanted answers, and remove this field",
        )
    question, answer = (_text(record, name, PAIR_EXAMPLE) for name in pairs[0])
    return _parsed(record, question, answer)


def _pairs_in(record: Record) -> list[tuple[str, str]]:
    return [pair for pair in PAIRS if record.get(pair[0]) is not None and record.get(pair[1]) is not None]


def _parsed(record: Record, question: str, answer: str) -> Parsed:
    turns = [*_history(record), Turn("user", question), Turn("assistant", answer)]
    return with_system(record, turns), parse_tools(record)


def _history(record: Record) -> list[Turn]:
    """The turns of earlier questions and answers."""
    history = record.get("history")
    if is_empty(history):
        return []
    fix = 'Write "history": [["question", "answer"], ...]'
    if not isinstance(history, list):
        raise InvalidRecord(f'"history" must be a list of [question, answer], not {shown(history)}', fix)
    turns = []
    for number, pair in enumerate(history, 1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise InvalidRecord(f'entry {number} of "history" must be two strings, not {shown(pair)}', fix)
        turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    return turns


def _text(record: Record, name: str, example: str) -> str:
    text = record.get(name)
    if isinstance(text, str):
        return text
    if name not in record:
        raise InvalidRecord(f'the record has no "{name}", its fields are {shown(list(record))}', example)
    raise InvalidRecord(f'"{name}" must be a string, not {shown(text)}', _STRING_FIX)
