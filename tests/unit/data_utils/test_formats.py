"""Every format: what its records become, and the line that says why one is refused."""

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
from data_utils.schema import Conversation, shown
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
    refused,
    result,
    two_calls,
)

# ------------------------------------------------------------------------------------------------- what records become


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
def test_each_format_is_recognised_and_read(name: str, record: dict[str, Any]) -> None:
    assert recognise(record, WHERE) is FORMATS[name]
    assert parse(record) == Conversation(TURNS, WHERE)


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_thinking_is_read_under_each_of_its_names(field: str) -> None:
    user, assistant = TURNS
    expected = Conversation((user, assistant._replace(thinking="\nHm.")), WHERE)
    thought = {field: "\nHm.", "reasoning_content": "\nHm."}
    assert parse({"messages": [ASK, {**ANSWER, **thought}]}) == expected
    assert parse({"conversations": [HI, {**HELLO, field: "\nHm."}]}) == expected
    [_, turn] = parse({"conversations": [HI, {**called({"name": "f"}), field: "\nHm."}]}).turns
    assert (turn.content, turn.thinking, len(turn.calls)) == ("", "\nHm.", 1)


def test_the_formats_and_their_order() -> None:
    assert list(FORMATS) == ["conversations", "messages", "alpaca", "pairs"]
    assert [name for name, format_ in FORMATS.items() if format_.name == name and format_.write] == [
        "conversations",
        "messages",
    ]


def test_an_empty_list_fits_by_its_name() -> None:
    assert recognise({"conversations": []}, WHERE).name == "conversations"
    assert recognise({"messages": []}, WHERE).name == "messages"


def test_an_answer_may_come_first_or_be_missing() -> None:
    assert parse({"conversations": [HELLO, HI]}).turns == TURNS[::-1]
    assert parse({"messages": [ASK]}).turns == TURNS[:1]


def test_the_place_is_kept_and_not_written_out() -> None:
    class Unwritten(Location):
        def __str__(self) -> str:
            raise AssertionError("formatted without need")

    where = Unwritten("chats.jsonl", 7)
    for record in ({"conversations": [HI, HELLO]}, {"messages": [ASK, ANSWER]}, {"instruction": "a", "output": "b"}):
        assert recognise(record, where).parse(record, where).where is where


@pytest.mark.parametrize("text", ["\ud800", "a\0b", "x" * 5_000_000, "", "\u2028\x1b[31m", "<|im_end|>"])
def test_any_text_is_text(text: str) -> None:
    assert parse({"conversations": [{"from": "user", "value": text}]}).turns == (Turn("user", text),)
    assert parse({"messages": [{"role": "user", "content": text}]}).turns == (Turn("user", text),)
    assert parse({"prompt": text, "response": text}).turns == (Turn("user", text), Turn("assistant", text))


def test_alpaca_joins_with_a_line_and_the_history_comes_first() -> None:
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
def test_a_system_message_is_the_first_turn(record: dict[str, Any]) -> None:
    assert parse(record).turns == (Turn("system", "Be brief."), *TURNS)


def test_an_empty_system_turn_stays_and_an_empty_field_says_nothing() -> None:
    assert parse({"conversations": [{"from": "system", "value": ""}, HI]}).turns == (Turn("system", ""), TURNS[0])
    assert parse({"conversations": [HI], "system": ""}).turns == TURNS[:1]


# ------------------------------------------------------------------------------------------------------------- refusals


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
            "\"tool_calls\" ([{'name': 'f'}]) in turn 2: calls are turns of their own here",
        ),
        (
            {"conversations": [HI, {**HELLO, "reasoning_content": 3}]},
            '"reasoning_content" of turn 2 must be a string, not 3 (read as conversations). Write the thinking as a',
        ),
        (
            {"conversations": [{**HI, "images": ["a.png"]}]},
            "\"images\" (['a.png']) in turn 1: only text can be trained",
        ),
    ],
)
def test_faulty_conversations(record: object, message: str) -> None:
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
        ({"messages": [{**ASK, "thinking": "hm"}]}, "turn 1 has \"thinking\" ('hm'), and only the assistant thinks"),
        ({"messages": [ASK, {**ANSWER, "reasoning": [1]}]}, '"reasoning" of turn 2 must be a string, not [1]'),
        (
            {"messages": [ASK, {**ANSWER, "reasoning": "a", "thinking": "b"}]},
            '"reasoning" and "thinking" of turn 2 mean the same and differ',
        ),
        (
            {"messages": [{**ASK, "audio": {"id": "x"}}]},
            "\"audio\" ({'id': 'x'}) in turn 1: only text can be trained on",
        ),
    ],
)
def test_faulty_messages(record: object, message: str) -> None:
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
        ("pairs", {"prompt": [ASK], "completion": [ANSWER]}, "\"prompt\" must be a string, not [{'role': 'user', "),
        (
            "pairs",
            {"prompt": "a", "response": "b", "completion": "c"},
            'the record has several pairs: "prompt", "response" and "prompt", "completion"',
        ),
        (
            "pairs",
            {"prompt": "a", "completion": "b", "label": False},
            '"label" (False) says whether the answer is wanted',
        ),
        ("pairs", {"question": "a", "answer": 4}, '"answer" must be a string, not 4'),
    ],
)
def test_faulty_pairs(name: str, record: object, message: str) -> None:
    refused(record, name, message)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("images", ["a.png"], "\"images\" (['a.png']) in the record: only text can be trained on"),
        ("image", "a.png", "\"image\" ('a.png') in the record: only text can be trained on"),
        ("audios", {"a": 1}, "\"audios\" ({'a': 1}) in the record: only text can be trained on"),
        ("rejected", "no", "\"rejected\" ('no') in the record: preferences between answers cannot be trained on"),
        ("kto_tag", False, '"kto_tag" (False) in the record: preferences between answers cannot be trained on'),
        ("weight", 0, '"weight" (0) in the record: it counts for a turn and would be ignored here'),
        ("train", False, '"train" (False) in the record: it counts for a turn and would be ignored here'),
        ("loss", 0.5, '"loss" (0.5) in the record: it counts for a turn and would be ignored here'),
    ],
)
def test_fields_that_would_silently_be_ignored(name: str, field: str, value: object, message: str) -> None:
    assert recognise(EVERY_FORMAT[name], WHERE).name == name
    refused({**EVERY_FORMAT[name], field: value}, name, message)


def test_fields_that_mean_nothing() -> None:
    for record in EVERY_FORMAT.values():
        fields = {"id": 3, "source": {"a": [None]}, "images": [], "chosen": None, "rejected": "", "weight": None}
        assert parse({**record, **fields}).turns == TURNS


@pytest.mark.parametrize(
    ("record", "shown_record"),
    [
        (3, "3"),
        (["\x1b[2J"], r"['\x1b[2J']"),
        ({}, "{}"),
        ({"text": "x" * 999, "n": 1}, "{'text': '" + "x" * 150 + "...', 'n': 1}"),
        ({"instruction": "a", "answer": "b"}, "{'instruction': 'a', 'answer': 'b'}"),
        ({"conversations": "x"}, "{'conversations': 'x'}"),
        ({"conversations": ["x"]}, "{'conversations': ['x']}"),
        ({"messages": [{"text": "x"}]}, "{'messages': [{'text': 'x'}]}"),
        ({"prompt": None, "response": "b"}, "{'prompt': None, 'response': 'b'}"),
        ({"a": [[[[["b"]]]]]}, "{'a': [[...]]}"),
    ],
)
def test_what_fits_nothing_is_shown(record: object, shown_record: str) -> None:
    with pytest.raises(DataError) as error:
        recognise(record, Location("chats.jsonl", 7))
    text = str(error.value)
    assert text.startswith(f"{WHERE}: the record has no known format: {shown_record}. Looked for conversations: a list")
    assert all(f"{name}: {format_.looks_for}" in text for name, format_ in FORMATS.items())
    assert text.isprintable()


def test_preferences_are_named_where_nothing_fits() -> None:
    with pytest.raises(DataError, match=r"^x: \"chosen\" \('a'\) in the record: preferences between answers cannot"):
        recognise({"prompt": "p", "chosen": "a", "rejected": "b"}, "x")


def test_values_are_shown_on_one_short_line() -> None:
    assert shown("a\u202e\x1b\n") == r"'a\u202e\x1b\n'"
    assert shown({"a": "b" * 50, "c": [1, {}]}) == "{'a': '" + "b" * 30 + "...', 'c': [1, {}]}"
    assert shown({"a": "b" * 50, "c": "d" * 50}) == "{'a': '" + "b" * 30 + "...', 'c': 'dddddddd..."
    assert len(shown({"a" * 99: [["b" * 99] * 99] * 99})) == 60
    assert shown(list(range(1000))) == "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]"
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert shown(deep) == "[[[...]]]"
    while deep:  # which Python would take apart recursively
        deep = deep[0]


# ------------------------------------------------------------------------------------------------------------- anything

VALID: list[dict[str, Any]] = [
    *EVERY_FORMAT.values(),
    {"conversations": [HI, called({"name": "f"}), {"from": "tool", "value": ""}], "tools": [TOOL], "system": "x"},
    two_calls(result("A", "1"), result("B", "2")),
    {"messages": [{**ASK, "content": [{"type": "text", "text": "x"}], "train": True, "weight": 1}], "tools": "[]"},
    {"messages": [{**ANSWER, "function_call": {"name": "f", "arguments": "{}"}}]},
    {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]]},
]


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every list or object within, with each index or key that it has."""
    found = [(value, key) for key in (value if isinstance(value, dict) else range(len(value)))]
    return found + [
        place for outer, key in found if isinstance(outer[key], (dict, list)) for place in places(outer[key])
    ]


@settings(max_examples=400, deadline=None)
@given(record=st.sampled_from(VALID), name=st.sampled_from([None, *FORMATS]), value=JSON, data=st.data())
def test_a_wrong_value_anywhere_is_refused_or_read(
    record: dict[str, Any], name: str | None, value: object, data: st.DataObject
) -> None:
    record = json.loads(json.dumps(record))
    outer, key = data.draw(st.sampled_from(places(record)))
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
def test_nesting_without_end_anywhere_is_refused_or_read(make: Any) -> None:
    deep: Any = make(1)
    for _ in range(5_000):
        deep = make(deep)
    for valid in VALID:
        for index in range(len(places(valid))):
            record = json.loads(json.dumps(valid))
            outer, key = places(record)[index]
            outer[key] = deep
            for name in (None, *FORMATS):
                try:
                    conversation = parse({**record, "other": deep}, name)
                except DataError as error:
                    assert len(str(error)) < 1000
                else:  # it stands where nothing is read
                    assert conversation.turns == parse(valid).turns


# ----------------------------------------------------------------------------------------------------------- real files


@pytest.mark.parametrize(
    ("file", "name", "records", "turns"),
    [
        ("alpaca_en_demo.json", "alpaca", 999, 1998),
        ("alpaca_zh_demo.json", "alpaca", 1000, 2000),
        ("identity.json", "alpaca", 91, 182),
        ("fastchat_dummy_conversation.json", "conversations", 500, 2000),
        ("glaive_toolcall_en_demo.json", "conversations", 300, 1914),
    ],
)
def test_real_files(shared: Path, file: str, name: str, records: int, turns: int) -> None:
    values = json.loads((shared / "corpora" / file).read_text(encoding="utf-8"))
    assert len(values) == records
    assert {recognise(value, WHERE).name for value in values} == {name}
    assert sum(len(parse(value).turns) for value in values) == turns
