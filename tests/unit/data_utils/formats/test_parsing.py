"""Records of every format that are recognised and parsed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat.turns import Turn
from data_utils.files import Location
from data_utils.formats import FORMATS, recognise
from data_utils.schema import Conversation
from errors import DataError
from tests.records import (
    ANSWER,
    ASK,
    EVERY_FORMAT,
    HELLO,
    HI,
    JSON,
    TOOL,
    TURNS,
    WHERE,
    called,
    parse,
    result,
    two_calls,
)


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("conversations", {"id": "a", "conversations": [HI, HELLO]}),
        ("conversations", {"messages": [HI, HELLO], "conversations": None}),
        ("conversations", {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}),
        ("conversations", {"conversations": [{**HI, "role": None, "content": None}, HELLO]}),
        ("conversations", {"conversations": [{**HI, "role": "user"}, HELLO]}),
        ("messages", {"messages": [ASK, ANSWER], "prompt": "Hi", "response": "Hello!"}),
        ("messages", {"conversations": [ASK, ANSWER]}),
        (
            "messages",
            {"messages": [{**ASK, "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}, ANSWER]},
        ),
        (
            "messages",
            {"messages": [{**ASK, "from": None, "name": "me"}, {**ANSWER, "tool_calls": [], "function_call": None}]},
        ),
        ("messages", {"messages": [ASK, {**ANSWER, "function_call": {}, "tool_calls": "", "thinking": ""}]}),
        ("alpaca", {"instruction": "Hi", "output": "Hello!"}),
        ("alpaca", {"instruction": "Hi", "input": "", "output": "Hello!", "history": [], "system": "", "tools": None}),
        ("alpaca", {"instruction": "Hi", "input": None, "output": "Hello!", "prompt": "x", "response": "y"}),
        ("alpaca", {"instruction": "", "input": "Hi", "output": "Hello!", "conversations": None}),
        ("pairs", {"prompt": "Hi", "response": "Hello!"}),
        ("pairs", {"prompt": "Hi", "completion": "Hello!", "response": None}),
        ("pairs", {"question": "Hi", "answer": "Hello!", "prompt": "x", "label": 3}),
        ("pairs", {"query": "Hi", "response": "Hello!", "history": None}),
    ],
)
def test_each_format_is_recognised_and_parsed(name: str, record: dict[str, Any]) -> None:
    assert recognise(record, WHERE) is FORMATS[name]
    assert parse(record) == Conversation(TURNS, WHERE)


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_read_under_each_of_its_names(field: str) -> None:
    user, assistant = TURNS
    expected = Conversation((user, assistant._replace(thinking="\nHm.")), WHERE)
    thought = {field: "\nHm.", "reasoning_content": "\nHm."}
    assert parse({"messages": [ASK, {**ANSWER, **thought}]}) == expected
    assert parse({"conversations": [HI, {**HELLO, field: "\nHm."}]}) == expected
    [_, turn] = parse({"conversations": [HI, {**called({"name": "f"}), field: "\nHm."}]}).turns
    assert (turn.content, turn.thinking, len(turn.calls)) == ("", "\nHm.", 1)


def test_formats_and_their_order() -> None:
    assert list(FORMATS) == ["conversations", "messages", "alpaca", "pairs", "text"]
    assert [name for name, format_ in FORMATS.items() if format_.name == name and format_.write] == [
        "conversations",
        "messages",
    ]


def test_empty_list_is_recognised_by_its_name() -> None:
    assert recognise({"conversations": []}, WHERE).name == "conversations"
    assert recognise({"messages": []}, WHERE).name == "messages"


def test_answer_may_come_first_or_be_missing() -> None:
    assert parse({"conversations": [HELLO, HI]}).turns == TURNS[::-1]
    assert parse({"messages": [ASK]}).turns == TURNS[:1]


def test_location_is_stored_without_formatting_it() -> None:
    class Unformatted(Location):
        def __str__(self) -> str:
            raise AssertionError("the location was formatted")

    where = Unformatted("chats.jsonl", 7)
    for record in ({"conversations": [HI, HELLO]}, {"messages": [ASK, ANSWER]}, {"instruction": "a", "output": "b"}):
        assert recognise(record, where).parse(record, where).where is where


@pytest.mark.parametrize("text", ["\ud800", "a\0b", "x" * 5_000_000, "", "\u2028\x1b[31m", "<|im_end|>"])
def test_any_text_is_kept_unchanged(text: str) -> None:
    assert parse({"conversations": [{"from": "user", "value": text}]}).turns == (Turn("user", text),)
    assert parse({"messages": [{"role": "user", "content": text}]}).turns == (Turn("user", text),)
    assert parse({"prompt": text, "response": text}).turns == (Turn("user", text), Turn("assistant", text))


def test_alpaca_joins_instruction_and_input_after_the_history() -> None:
    record = {
        "instruction": "Add.",
        "input": "1 and 2",
        "output": "3",
        "system": "Be brief.",
        "history": [["Hi", "Hello!"], ["", "a"]],
    }
    assert parse(record).turns == (
        Turn("system", "Be brief."),
        Turn("user", "Hi"),
        Turn("assistant", "Hello!"),
        Turn("user", ""),
        Turn("assistant", "a"),
        Turn("user", "Add.\n1 and 2"),
        Turn("assistant", "3"),
    )


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": [{"from": "system", "value": "Be brief."}, HI, HELLO]},
        {"conversations": [HI, HELLO], "system": "Be brief."},
        {"conversations": [{"from": "system", "value": "Be brief."}, HI, HELLO], "system": "Be brief."},
        {"messages": [{"role": "developer", "content": "Be brief."}, ASK, ANSWER]},
        {"messages": [ASK, ANSWER], "system": "Be brief."},
        {"instruction": "Hi", "output": "Hello!", "system": "Be brief."},
        {"query": "Hi", "response": "Hello!", "system": "Be brief."},
    ],
)
def test_system_message_is_the_first_turn(record: dict[str, Any]) -> None:
    assert parse(record).turns == (Turn("system", "Be brief."), *TURNS)


def test_empty_system_turn_is_kept_and_empty_field_is_ignored() -> None:
    assert parse({"conversations": [{"from": "system", "value": ""}, HI]}).turns == (Turn("system", ""), TURNS[0])
    assert parse({"conversations": [HI], "system": ""}).turns == TURNS[:1]


VALID: list[dict[str, Any]] = [
    *EVERY_FORMAT.values(),
    {"conversations": [HI, called({"name": "f"}), {"from": "tool", "value": ""}], "tools": [TOOL], "system": "x"},
    two_calls(result("A", "1"), result("B", "2")),
    {"messages": [{**ASK, "content": [{"type": "text", "text": "x"}], "train": True, "weight": 1}], "tools": "[]"},
    {"messages": [{**ANSWER, "function_call": {"name": "f", "arguments": "{}"}}]},
    {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]]},
]


def positions(value: Any) -> list[tuple[Any, Any]]:
    """Return every list or object within a value, with each of its indices or keys."""
    pairs = [(value, key) for key in (value if isinstance(value, dict) else range(len(value)))]
    return pairs + [
        position for outer, key in pairs if isinstance(outer[key], (dict, list)) for position in positions(outer[key])
    ]


@settings(max_examples=400, deadline=None)
@given(record=st.sampled_from(VALID), name=st.sampled_from([None, *FORMATS]), value=JSON, data=st.data())
def test_wrong_value_anywhere_is_refused_or_parsed(
    record: dict[str, Any], name: str | None, value: object, data: st.DataObject
) -> None:
    record = json.loads(json.dumps(record))
    outer, key = data.draw(st.sampled_from(positions(record)))
    outer[key] = value
    try:
        conversation = parse(record, name)
    except DataError as error:
        assert str(error).startswith(f"{WHERE}: ") and str(error).isprintable()
    else:
        assert all(isinstance(turn.content, str) for turn in conversation.turns) and conversation.turns
        for format_ in FORMATS.values():
            if format_.write is not None:
                json.dumps(format_.write(conversation, {}))


@pytest.mark.parametrize("make", [lambda inner: [inner], lambda inner: {"a": inner}])
def test_deep_nesting_anywhere_is_refused_or_parsed(make: Any) -> None:
    deep: Any = make(1)
    for _ in range(5_000):
        deep = make(deep)
    for valid in VALID:
        for index in range(len(positions(valid))):
            record = json.loads(json.dumps(valid))
            outer, key = positions(record)[index]
            outer[key] = deep
            for name in (None, *FORMATS):
                try:
                    conversation = parse({**record, "other": deep}, name)
                except DataError as error:
                    assert len(str(error)) < 1000
                else:  # at a position that is not parsed
                    assert conversation.turns == parse(valid).turns


def test_real_files(shared: Path) -> None:
    paths = sorted((shared / "corpora").glob("*.json"))
    assert paths
    for path in paths:
        records = json.loads(path.read_text(encoding="utf-8"))
        name = "alpaca" if "instruction" in records[0] else "conversations"
        assert {recognise(record, WHERE).name for record in records} == {name}, path.name
        for record in records:
            texts = [text for pair in record.get("history") or [] for text in pair] + ["instruction", "output"]
            count = len(record.get("conversations") or texts) + bool(record.get("system"))
            assert len(parse(record).turns) == count, path.name
