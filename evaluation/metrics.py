"""Scores of answers, each from 0 to 1: how close a given answer is to the expected one. Needs no torch.

Texts are compared as ROUGE-L and chrF do, calls as JSON values. A score that an answer cannot have, such as that of its
calls if none are expected, is left out, so that a mean is over the answers that have it.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from chat.turns import ToolCall, Turn

SCORES = {
    "exact_match": "the expected answer, but for white space",
    "contains": "has the words of the expected answer, one after the other",
    "rouge_l": "longest common sequence of words (Chinese, Japanese: of characters), F1",
    "chrf": "common character sequences of up to 6, chrF2",
    "valid_json": "JSON where the expected answer is a JSON object or list",
    "call_name": "the expected functions are called, in their order",
    "call_arguments": "the same, with equal arguments as JSON values",
    "stopped": "ended by itself, within the length limit",
}
"""The scores, and when an answer has 1."""

OTHER_SCORES = {
    "accuracy": "the right letter, or the right number",
    "pass@1": "a program that passes the tests",
    "tool_selection": "the right functions are called, where some are expected",
    "tool_input": "ROUGE-L of the arguments of calls, of the tokens of their JSON",
    "false_positive": "a function is called where none is expected",
}
"""Those of benchmarks and of tool use. Of ``false_positive`` less is better."""

ANSWER_TOKENS = "answer_tokens"
"""A figure that is no score: tokens of an answer."""

_CHRF_ORDER, _CHRF_BETA = 6, 2
# Scripts that do not separate words: ideographs with their extensions, and kana.
_UNSEPARATED = r"\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORDS = re.compile(rf"[{_UNSEPARATED}]|[^\W{_UNSEPARATED}]+")


class Reply(NamedTuple):
    """What an answer says and calls, without its thinking."""

    text: str
    calls: tuple[ToolCall, ...] = ()

    @classmethod
    def of(cls, turn: Turn) -> Reply:
        return cls(turn.content, turn.calls)

    @property
    def whole(self) -> str:
        """Return the text followed by the calls, a line each, equal for equal arguments."""
        calls = [f"{call.name} {canonical(call.arguments)}" for call in self.calls]
        return "\n".join([*([self.text] if self.text or not calls else []), *calls])


def score_answer(expected: Reply, given: Reply) -> dict[str, float]:
    """Return the scores of an answer by name, but ``stopped``, which its text does not show."""
    names = [call.name for call in expected.calls] == [call.name for call in given.calls]
    calls = names and all(map(_same_arguments, expected.calls, given.calls))
    scores = {
        "exact_match": float(calls and _spaced(expected.text) == _spaced(given.text)),
        "rouge_l": rouge_l(expected.whole, given.whole),
        "chrf": chrf(expected.whole, given.whole),
    }
    if expected.calls:
        scores |= {"call_name": float(names), "call_arguments": float(calls)}
        return scores
    scores["contains"] = float(_contains(words_of(given.text), words_of(expected.text)))
    if isinstance(_parsed(expected.text), (dict, list)):
        scores["valid_json"] = float(_parsed(given.text) is not _INVALID)
    return scores


def mean_scores(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each figure over the rows that have it."""
    columns: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in columns.items()}


# -------------------------------------------------------------------------------------------------------------- texts


def _spaced(text: str) -> str:
    return " ".join(text.split())


def words_of(text: str) -> list[str]:
    """Return the words of a text in small letters, without punctuation; each character of Chinese and Japanese."""
    return _WORDS.findall(unicodedata.normalize("NFC", text).lower())


def _contains(words: Sequence[str], sought: Sequence[str]) -> bool:
    count = len(sought)
    return any(words[at : at + count] == sought for at in range(len(words) - count + 1))


def rouge_l(expected: str, given: str) -> float:
    """Return the F1 of precision and recall of the longest common subsequence of words; 1 for two texts without any."""
    words, others = words_of(expected), words_of(given)
    if not words or not others:
        return float(_spaced(expected) == _spaced(given))
    return sequence_f1(words, others)


def sequence_f1(words: Sequence[str], others: Sequence[str]) -> float:
    """Return the F1 of the longest common subsequence of two sequences; 1 for two empty ones."""
    if not words and not others:
        return 1.0
    return 2 * _common_length(words, others) / (len(words) + len(others))


def _common_length(words: Sequence[str], others: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, with one bit for each of ``words``."""
    places: dict[str, int] = {}
    for index, word in enumerate(words):
        places[word] = places.get(word, 0) | 1 << index
    every = (1 << len(words)) - 1
    row = every  # a zero bit: the subsequence grows there
    for word in others:
        matched = row & places.get(word, 0)
        row = (row + matched | row - matched) & every
    return len(words) - row.bit_count()


def chrf(expected: str, given: str) -> float:
    """Return chrF2: the F score of character sequences of 1 to 6, white space left out, with twice the recall's weight.

    Precision and recall are means over the lengths that both texts have; 1 for two empty texts.
    """
    texts = ["".join(text.split()) for text in (expected, given)]
    if not all(texts):
        return float(texts[0] == texts[1])
    precision = recall = 0.0
    orders = range(1, min(_CHRF_ORDER, *map(len, texts)) + 1)
    for order in orders:
        sequences, others = (Counter(text[at : at + order] for at in range(len(text) - order + 1)) for text in texts)
        common = (sequences & others).total()
        precision += common / others.total()
        recall += common / sequences.total()
    if not precision:
        return 0.0
    precision, recall = precision / len(orders), recall / len(orders)
    weight = _CHRF_BETA**2
    return (1 + weight) * precision * recall / (weight * precision + recall)


# --------------------------------------------------------------------------------------------------------------- JSON

_INVALID = object()


def _parsed(text: str) -> Any:
    """Return a JSON value, or ``_INVALID``."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _INVALID


def _refuse(name: str) -> Any:
    raise ValueError(name)


def arguments_value(arguments: Any) -> Any:
    """Return the arguments of a call as a JSON value; a text that is none stays text."""
    value = _parsed(arguments) if isinstance(arguments, str) else arguments
    return _spaced(arguments) if value is _INVALID else value


def canonical(arguments: Any) -> str:
    """Return the arguments of a call as JSON, equal for equal ones."""
    value = arguments_value(arguments)
    try:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
    except RecursionError:  # deeper than can be written, but not than can be read
        return str(arguments)


def _same_arguments(call: ToolCall, other: ToolCall) -> bool:
    try:
        return _same(arguments_value(call.arguments), arguments_value(other.arguments))
    except RecursionError:
        return False


def _same(one: Any, other: Any) -> bool:
    """Return whether two JSON values are equal: 1 and 1.0 are, 1 and true are not."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)
