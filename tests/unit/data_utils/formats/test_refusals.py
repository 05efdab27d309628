"""Records that a format refuses, with the message."""

from __future__ import annotations

from typing import Any

import pytest

from data_utils.files import Location
from data_utils.formats import FORMATS, recognise
from data_utils.schema import short_repr
from errors import DataError
from tests.records import ANSWER, ASK, EVERY_FORMAT, HELLO, HI, TURNS, WHERE, parse, refused

FIX = 'Write {"conversations": [{"from": "user", "value": "..."}, {"from": "assistant", "value": "..."}]}'


SYSTEM = {"from": "system", "value": "x"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (["a"], f"a record must be an object, not ['a'] (read as conversations). {FIX}"),
        (None, "a record must be an object, not None"),
        ("x\n" * 99, "a record must be an object, not 'x\\nx\\n"),
        ({}, f'the record has no "conversations", its fields are [] (read as conversations). {FIX}'),
        ({"instruction": "a"}, "the record has no \"conversations\", its fields are ['instruction']"),
        ({"conversations": None}, "the record has no \"conversations\", its fields are ['conversations']"),
        ({"conversations": "Hi"}, "\"conversations\" must be a list of turns, not 'Hi'"),
        ({"messages": {"a": 1}}, "\"messages\" must be a list of turns, not {'a': 1}"),
        ({"conversations": []}, '"conversations" is empty (read as conversations). Give it at least one turn, or'),
        ({"conversations": [HI], "messages": [ASK]}, 'the record has "conversations" and "messages"'),
        ({"conversations": [HI, "Hello!"]}, f"turn 2 must be an object, not 'Hello!' (read as conversations). {FIX}"),
        ({"conversations": [{"value": "x"}]}, "turn 1 has no \"from\", its fields are ['value']"),
        ({"conversations": [HI, ANSWER]}, "turn 2 has no \"from\", its fields are ['role', 'content']"),
        ({"conversations": [HI, {"from": "gpt"}]}, "turn 2 has no \"value\", its fields are ['from']"),
        (
            {"conversations": [{"from": "user", "value": None}]},
            'the "value" of turn 1 must be a string, not None (read as conversations). Write the text as a string',
        ),
        ({"conversations": [{"from": "user", "value": 1.5}]}, 'the "value" of turn 1 must be a string, not 1.5'),
        (
            {"conversations": [{"from": "user", "value": ["a" * 99]}]},
            f'the "value" of turn 1 must be a string, not [\'{"a" * 55}... (read',
        ),
        (
            {"conversations": [HI, {"from": "bot", "value": "x"}]},
            "turn 2 is from an unknown role, 'bot' (read as conversations). Known roles are user, human, assistant, "
            "gpt, system, function_call, observation, tool, function",
        ),
        ({"conversations": [{"from": ["user"], "value": "x"}]}, "turn 1 is from an unknown role, ['user']"),
        ({"conversations": [{"from": "\x1b[1m", "value": "x"}]}, "turn 1 is from an unknown role, '\\x1b[1m'"),
        (
            {"conversations": [HI, SYSTEM]},
            "turn 2 is from 'system' (read as conversations). A system message can only be the first turn",
        ),
        ({"conversations": [SYSTEM, HI], "system": "y"}, "the \"system\" field ('y') and the system turn differ"),
        ({"conversations": [HI], "system": ["y"]}, "\"system\" must be a string, not ['y']"),
        (
            {"conversations": [HI, {**HELLO, "tool_calls": [{"name": "f"}]}]},
            "\"tool_calls\" ([{'name': 'f'}]) in turn 2: in this format a call is a turn of its own",
        ),
        (
            {"conversations": [HI, {**HELLO, "reasoning_content": 3}]},
            '"reasoning_content" of turn 2 must be a string, not 3 (read as conversations). Write the reasoning as a',
        ),
        (
            {"conversations": [{**HI, "images": ["a.png"]}]},
            "\"images\" (['a.png']) in turn 1: only text can be trained",
        ),
    ],
)
def test_invalid_conversations(record: object, message: str) -> None:
    refused(record, "conversations", message)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (3, 'a record must be an object, not 3 (read as messages). Write {"messages": [{"role": "user", "content"'),
        ({"prompt": "a"}, "the record has no \"messages\", its fields are ['prompt']"),
        ({"messages": [HI]}, "turn 1 has no \"role\", its fields are ['from', 'value']"),
        ({"messages": [ASK, {"role": "gpt", "content": "x"}]}, "turn 2 is from an unknown role, 'gpt'"),
        ({"messages": [ASK, {"role": "developer", "content": "x"}]}, "turn 2 is from 'developer'"),
        ({"messages": [ASK, {"role": "assistant"}]}, "turn 2 has no \"content\", its fields are ['role']"),
        (
            {"messages": [ASK, {"role": "assistant", "content": None, "tool_calls": []}]},
            'the "content" of turn 2 must be a string, not None',
        ),
        ({"messages": [{"role": "user", "content": {"text": "x"}}]}, 'the "content" of turn 1 must be a string, not {'),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "a part of turn 1 must be an object, not 'x'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "turn 1 has a part of type 'image_url': only text can be trained on",
        ),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "turn 1 has a part of type None"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]},
            'the "text" of a part of turn 1 must be a string, not 3',
        ),
        (
            {"messages": [{**ASK, "thinking": "hm"}]},
            "turn 1 has \"thinking\" ('hm'), which only assistant turns can have",
        ),
        ({"messages": [ASK, {**ANSWER, "reasoning": [1]}]}, '"reasoning" of turn 2 must be a string, not [1]'),
        (
            {"messages": [ASK, {**ANSWER, "reasoning": "a", "thinking": "b"}]},
            '"reasoning" and "thinking" of turn 2 have the same meaning but differ',
        ),
        (
            {"messages": [{**ASK, "audio": {"id": "x"}}]},
            "\"audio\" ({'id': 'x'}) in turn 1: only text can be trained on",
        ),
    ],
)
def test_invalid_messages(record: object, message: str) -> None:
    refused(record, "messages", message)


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        ("alpaca", {"output": "b"}, "the record has no \"instruction\", its fields are ['output']"),
        ("alpaca", {"instruction": "a"}, "the record has no \"output\", its fields are ['instruction']"),
        ("alpaca", {"instruction": "a", "output": None}, '"output" must be a string, not None'),
        ("alpaca", {"instruction": ["a"], "output": "b"}, "\"instruction\" must be a string, not ['a']"),
        ("alpaca", {"instruction": "a", "input": 3, "output": "b"}, '"input" must be a string, not 3'),
        (
            "alpaca",
            {"instruction": "a", "output": "b", "history": "c"},
            '"history" must be a list of [question, answer]',
        ),
        (
            "alpaca",
            {"instruction": "a", "output": "b", "history": [["c", "d"], ["e"]]},
            "entry 2 of \"history\" must be two strings, not ['e']",
        ),
        (
            "alpaca",
            {"instruction": "a", "output": "b", "history": [["c", None]]},
            "entry 1 of \"history\" must be two strings, not ['c', None]",
        ),
        ("alpaca", {"instruction": "a", "output": "b", "history": ["cd"]}, 'entry 1 of "history" must be two strings'),
        ("alpaca", {"instruction": "a", "output": "b", "system": 1}, '"system" must be a string, not 1'),
        (
            "pairs",
            {"prompt": "a"},
            'the record has no pair "prompt" and "response", "prompt" and "completion", "question"',
        ),
        ("pairs", {"prompt": [ASK], "completion": "a"}, "\"prompt\" must be a string, not [{'role': 'user', "),
        (
            "pairs",
            {"prompt": "a", "response": "b", "completion": "c"},
            'the record has several pairs: "prompt", "response" and "prompt", "completion"',
        ),
        (
            "pairs",
            {"prompt": "a", "completion": "b", "label": False},
            '"label" (False) marks good and bad answers',
        ),
        ("pairs", {"question": "a", "answer": 4}, '"answer" must be a string, not 4'),
    ],
)
def test_invalid_alpaca_and_pairs(name: str, record: object, message: str) -> None:
    refused(record, name, message)


@pytest.mark.parametrize("name", EVERY_FORMAT)
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("images", ["a.png"], "\"images\" (['a.png']) in the record: only text can be trained on"),
        ("image", "a.png", "\"image\" ('a.png') in the record: only text can be trained on"),
        ("audios", {"a": 1}, "\"audios\" ({'a': 1}) in the record: only text can be trained on"),
        ("rejected", "no", "\"rejected\" ('no') in the record: preferences between answers cannot be trained on"),
        ("kto_tag", False, '"kto_tag" (False) in the record: preferences between answers cannot be trained on'),
        ("weight", 0, '"weight" (0) in the record: it applies to a turn and would be ignored here'),
        ("train", False, '"train" (False) in the record: it applies to a turn and would be ignored here'),
        ("loss", 0.5, '"loss" (0.5) in the record: it applies to a turn and would be ignored here'),
    ],
)
def test_unsupported_fields_are_refused(name: str, field: str, value: object, message: str) -> None:
    assert recognise(EVERY_FORMAT[name], WHERE).name == name
    refused({**EVERY_FORMAT[name], field: value}, name, message)


def test_unknown_and_empty_fields_are_ignored() -> None:
    for record in EVERY_FORMAT.values():
        fields = {"id": 3, "source": {"a": [None]}, "images": [], "chosen": None, "rejected": "", "weight": None}
        assert parse({**record, **fields}).turns == TURNS


@pytest.mark.parametrize(
    ("record", "shown_record"),
    [
        (3, "3"),
        (["\x1b[2J"], r"['\x1b[2J']"),
        ({}, "{}"),
        ({"body": "x" * 999, "n": 1}, "{'body': '" + "x" * 150 + "...', 'n': 1}"),
        ({"instruction": "a", "answer": "b"}, "{'instruction': 'a', 'answer': 'b'}"),
        ({"conversations": "x"}, "{'conversations': 'x'}"),
        ({"conversations": ["x"]}, "{'conversations': ['x']}"),
        ({"messages": [{"text": "x"}]}, "{'messages': [{'text': 'x'}]}"),
        ({"prompt": None, "response": "b"}, "{'prompt': None, 'response': 'b'}"),
        ({"a": [[[[["b"]]]]]}, "{'a': [[...]]}"),
    ],
)
def test_record_without_known_format_is_shown(record: object, shown_record: str) -> None:
    with pytest.raises(DataError) as error:
        recognise(record, Location("chats.jsonl", 7))
    text = str(error.value)
    assert text.startswith(f"{WHERE}: the record has no known format: {shown_record}. Looked for conversations: a list")
    assert all(f"{name}: {format_.description}" in text for name, format_ in FORMATS.items())
    assert text.isprintable()


def test_preferences_are_named_if_no_format_fits() -> None:
    with pytest.raises(DataError, match=r"^x: \"chosen\" \('a'\) in the record: preferences between answers cannot"):
        recognise({"prompt": "p", "chosen": "a", "rejected": "b"}, "x")


def test_short_repr_is_one_short_line() -> None:
    assert short_repr("a\u202e\x1b\n") == r"'a\u202e\x1b\n'"
    assert short_repr({"a": "b" * 50, "c": [1, {}]}) == "{'a': '" + "b" * 30 + "...', 'c': [1, {}]}"
    assert short_repr({"a": "b" * 50, "c": "d" * 50}) == "{'a': '" + "b" * 30 + "...', 'c': 'dddddddd..."
    assert len(short_repr({"a" * 99: [["b" * 99] * 99] * 99})) == 60
    assert short_repr(list(range(1000))) == "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]"
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert short_repr(deep) == "[[[...]]]"
    while deep:  # not in one step, which Python would do recursively
        deep = deep[0]
