"""Records as common toolkits and data sets write them: read, or refused in one line that says what to do."""

from __future__ import annotations

import json
from typing import Any

import pytest

from chat.turns import ToolCall, Turn
from data_utils.formats import FIELDS, FORMATS, recognise
from errors import DataError
from tests.records import ANSWER, ASK, HELLO, HI, WHERE, parse, refused

USER, ASSISTANT = Turn("user", "Hi"), Turn("assistant", "Hello!")
SYSTEM = Turn("system", "Be brief.")
TOOLS = json.dumps([{"name": "f"}])

READ: dict[str, tuple[dict[str, Any], tuple[Turn, ...]]] = {
    "sharegpt with system and tools": (
        {
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}],
            "system": "Be brief.",
            "tools": TOOLS,
        },
        (SYSTEM, USER, ASSISTANT),
    ),
    "openhermes": (
        {
            "conversations": [HI, {"from": "gpt", "value": "Hello!", "weight": None}],
            "system_prompt": None,
            "views": 3.0,
        },
        (USER, ASSISTANT),
    ),
    "openorca": (
        {"id": "a", "system_prompt": "Be brief.", "question": "Hi", "response": "Hello!"},
        (SYSTEM, USER, ASSISTANT),
    ),
    "alpaca with history": (
        {"instruction": "Hi", "input": "", "output": "Hello!", "system": "Be brief.", "history": [["Hi", "Hello!"]]},
        (SYSTEM, USER, ASSISTANT, USER, ASSISTANT),
    ),
    "query and response": (
        {"system": "Be brief.", "query": "Hi", "response": "Hello!", "history": [["Hi", "Hello!"]]},
        (SYSTEM, USER, ASSISTANT, USER, ASSISTANT),
    ),
    "prompt and completion": ({"prompt": "Hi", "completion": "Hello!"}, (USER, ASSISTANT)),
    "lists of prompt and completion": ({"prompt": [ASK], "completion": [ANSWER]}, (USER, ASSISTANT)),
    "answers in the prompt are not trained": (
        {"prompt": [ASK, ANSWER, ASK], "completion": [ANSWER]},
        (USER, ASSISTANT._replace(weight=0.0), USER, ASSISTANT),
    ),
    "openai with weights": (
        {"messages": [ASK, {**ANSWER, "weight": 0}, ASK, {**ANSWER, "weight": 1}], "parallel_tool_calls": False},
        (USER, ASSISTANT._replace(weight=0.0), USER, ASSISTANT._replace(weight=1.0)),
    ),
    "messages with loss": (
        {"messages": [ASK, {**ANSWER, "loss": False}, ASK, {**ANSWER, "loss": True, "loss_scale": 2.0}]},
        (USER, ASSISTANT._replace(weight=0.0), USER, ASSISTANT._replace(weight=2.0)),
    ),
    "turns with train": (
        {"conversations": [{**HI, "train": False}, {**HELLO, "train": True, "train_detail": None}]},
        (USER._replace(weight=0.0), ASSISTANT._replace(weight=1.0)),
    ),
    "messages with a function_call role": (
        {
            "messages": [
                ASK,
                {"role": "function_call", "content": '{"name": "f", "arguments": {}}'},
                {"role": "observation", "content": "1"},
                ANSWER,
            ],
            "tools": TOOLS,
        },
        (USER, Turn("assistant", "", (ToolCall("f", {}),)), Turn("tool", "1"), ASSISTANT),
    ),
}


@pytest.mark.parametrize("name", READ)
def test_records_of_toolkits_are_read(name: str) -> None:
    record, turns = READ[name]
    conversation = parse(record)
    assert conversation.turns == turns and conversation.notes == ()
    format_ = recognise(record, WHERE)
    assert set(format_.fields(record)) <= FIELDS
    for target in FORMATS.values():
        if target.write is not None:
            assert parse(json.loads(json.dumps(target.write(conversation, {})))).turns[-1] == turns[-1]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "plain text": ({"content": "Once"}, "the record has no known format: {'content': 'Once'}"),
    "token ids": ({"input_ids": [1], "labels": [1]}, "the record has no known format"),
    "segments": ({"segments": [{"label": True, "text": "a"}]}, "the record has no known format"),
    "contents and parts": (
        {"contents": [{"role": "user", "parts": [{"text": "a"}]}]},
        "the record has no known format",
    ),
    "rounds": ({"conversation": [{"human": "a", "assistant": "b"}]}, "the record has no known format"),
    "context": ({"instruction": "a", "context": "b", "response": "c"}, "the record has no known format"),
    "preferences": ({"chosen_messages": [ASK], "rejected_messages": [ASK]}, '"rejected_messages" ('),
    "preferred output": (
        {"input": {"messages": [ASK]}, "preferred_output": [ANSWER], "non_preferred_output": [ANSWER]},
        '"preferred_output" (',
    ),
    "good and bad": ({"prompt": "a", "completion": "b", "label": True}, '"label" (True) marks good and bad answers'),
    "images": ({"messages": [ASK, ANSWER], "images": ["a.png"]}, '"images" ('),
    "parts of turns": (
        {"messages": [ASK, {**ANSWER, "train_detail": [{"begin_offset": 0, "end_offset": 1, "train": True}]}]},
        '"train_detail" (',
    ),
    "tools in a turn": (
        {"conversations": [{"role": "system", "content": "x", "tools": [{"name": "f"}]}, ASK, ANSWER]},
        "\"tools\" ([{'name': 'f'}]) in turn 1: tools belong to the record",
    ),
    "two systems": (
        {"messages": [{"role": "system", "content": "A"}, {"role": "system", "content": "B"}]},
        "turn 2 is",
    ),
    "system fields": (
        {"messages": [ASK, ANSWER], "system": "a", "system_prompt": "b"},
        "the \"system_prompt\" field ('b') and the system turn differ",
    ),
    "history beside messages": (
        {"prompt": [ASK], "completion": [ANSWER], "history": [["a", "b"]]},
        'the record has "history" and a list "prompt"',
    ),
    "nothing to say": ({"prompt": [], "completion": []}, '"prompt" and "completion" are empty'),
    "a text and a list": ({"prompt": "Hi", "completion": [ANSWER]}, '"completion" must be a string, not ['),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_records_of_toolkits_are_refused_in_one_line(name: str) -> None:
    record, message = REFUSED[name]
    with pytest.raises(DataError) as error:
        parse(record)
    text = str(error.value)
    assert text.startswith(f"{WHERE}: {message}") and text.isprintable()


@pytest.mark.parametrize(
    ("role", "meant"),
    [
        ("System", "system"), ("User", "user"), ("ASSISTANT", "assistant"), (" tool ", "tool"), ("human", "user"),
        ("gpt", "assistant"), ("Chatbot", "assistant"), ("model", "assistant"), ("asistant", "assistant"),
        ("tool_result", "tool"),
    ],
)  # fmt: skip
def test_unknown_role_has_a_hint_at_the_one_that_is_meant(role: str, meant: str) -> None:
    refused({"messages": [{"role": role, "content": "x"}]}, "messages", f"turn 1 is from an unknown role, {role!r}")
    with pytest.raises(DataError, match=rf"\. Is '{meant}' meant\?$"):
        FORMATS["messages"].parse({"messages": [{"role": role, "content": "x"}]}, WHERE)


@pytest.mark.parametrize("role", ["", "x" * 500, "narrator", ["user"], 3, {"a": 1}])
def test_role_without_a_known_meaning_has_no_hint(role: object) -> None:
    with pytest.raises(DataError) as error:
        FORMATS["conversations"].parse({"conversations": [{"from": role, "value": "x"}]}, WHERE)
    assert "meant" not in str(error.value) and len(str(error.value)) < 400


def test_hints_use_the_names_of_the_format() -> None:
    with pytest.raises(DataError, match=r"Is 'human' meant\?$"):
        FORMATS["conversations"].parse({"conversations": [{"from": "Human:", "value": "x"}]}, WHERE)
    with pytest.raises(DataError, match=r"Is 'assistant' meant\?$"):
        FORMATS["conversations"].parse({"conversations": [{"from": "AI", "value": "x"}]}, WHERE)
