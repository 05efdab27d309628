"""Conversations written as records, and parsed again."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat.turns import ToolCall, Turn
from data_utils.formats import FORMATS, recognise
from data_utils.schema import Conversation
from tests.records import (
    JSON,
    TOOL,
    WHERE,
    called,
    openai_call,
    parse,
    result,
)

TEXTS = st.text(max_size=8) | st.sampled_from(
    ["\ud800", '{"a": 1}', '"a"', "null", "1.0", "1e5", "[]", '{"a":1}', "NaN"]
)
JSON_TEXTS = st.sampled_from(['{"a": 1}', '"a"', "null", "1.0", "1e5", " []", '{"a":1}', r'{"\u00e9": null}'])
ARGUMENT_VALUES = JSON.filter(
    lambda value: not isinstance(value, (str, type(None))) and not re.search("NaN|Infinity", json.dumps(value))
)
NAMES = st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters='"\\'), min_size=1, max_size=5)
CALLS = st.builds(ToolCall, NAMES, ARGUMENT_VALUES | JSON_TEXTS)
WEIGHT_VALUES = st.none() | st.sampled_from([0.0, 1.0, 0.5]) | st.floats(1e-6, 1e6)
THOUGHTS = st.none() | st.text(min_size=1, max_size=5)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    turns: list[Turn] = []
    if draw(st.booleans()):
        turns.append(Turn("system", draw(TEXTS), (), draw(WEIGHT_VALUES)))
    for role in draw(st.lists(st.sampled_from(["user", "assistant"]), min_size=1, max_size=4)):
        calls = tuple(draw(st.lists(CALLS, max_size=2))) if role == "assistant" else ()
        thinking = draw(THOUGHTS) if role == "assistant" else None
        turns.append(Turn(role, draw(TEXTS), calls, draw(WEIGHT_VALUES), thinking))
        turns += [Turn("tool", draw(TEXTS), (), draw(WEIGHT_VALUES)) for _ in calls]
    return Conversation(tuple(turns), WHERE, tuple(draw(st.lists(st.just(TOOL), max_size=1))))


def as_text(conversation: Conversation) -> Conversation:
    """Encode all arguments as JSON text, as ``messages`` does."""
    turns = tuple(
        turn._replace(calls=tuple(call._replace(arguments=call.arguments_text) for call in turn.calls))
        for turn in conversation.turns
    )
    return Conversation(turns, conversation.where, conversation.tools)


def split(conversation: Conversation) -> Conversation:
    """Move the text of a turn with calls to a turn before it, as ``conversations`` does."""
    turns: list[Turn] = []
    for turn in conversation.turns:
        if turn.calls and turn.content:
            turns.append(turn._replace(calls=()))
            turn = turn._replace(content="", thinking=None)
        turns.append(turn)
    return Conversation(tuple(turns), conversation.where, conversation.tools)


def rewritten(conversation: Conversation, name: str) -> Conversation:
    write = FORMATS[name].write
    assert write is not None
    record = json.loads(json.dumps(write(conversation, {"id": 3})))
    assert record["id"] == 3 and recognise(record, WHERE).name == name
    return parse(record)


@settings(max_examples=300, deadline=None)
@given(conversations())
def test_writing_and_parsing_gives_the_same_conversation(conversation: Conversation) -> None:
    in_messages, in_conversations = rewritten(conversation, "messages"), rewritten(conversation, "conversations")
    assert in_messages == as_text(conversation)
    assert as_text(in_conversations) == as_text(split(conversation))
    # The round trip requires that both formats agree on which arguments are text.
    assert rewritten(rewritten(in_messages, "conversations"), "messages") == split(in_messages)
    assert rewritten(rewritten(in_conversations, "messages"), "conversations") == in_conversations


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        ('{"a": 1, "b": [1e-07, 1.0, null]}', {"a": 1, "b": [1e-07, 1.0, None]}),
        ("[1, 2]", [1, 2]),
        ("true", True),
        ("12345678901234567890123", 12345678901234567890123),
        ('{"a":1}', '{"a":1}'),
        (r'{"a": "\u00e9"}', r'{"a": "\u00e9"}'),
        ('{"a": 1e5}', '{"a": 1e5}'),
        ('"a"', '"a"'),
        ("null", "null"),
        ({"a": None}, {"a": None}),
    ],
)
def test_arguments_in_conversations(arguments: object, written: object) -> None:
    write = FORMATS["conversations"].write
    assert write is not None
    record = write(Conversation((Turn("assistant", "", (ToolCall("f", arguments),)),), WHERE), {})
    assert json.loads(record["conversations"][0]["value"]) == {"name": "f", "arguments": written}
    assert parse(record).turns[0].calls == (ToolCall("f", written),)


def test_written_records() -> None:
    conversation = Conversation(
        (
            Turn("system", "Be brief."),
            Turn("user", "Hi", (), 0.0),
            Turn("assistant", "Wait.", (ToolCall("f", {"a": 1}), ToolCall("g", "[1,2]")), 1.0, "Hm."),
            Turn("tool", "1"),
            Turn("tool", "2"),
            Turn("assistant", "", (ToolCall("f", {}),), 0.5, "So?"),
            Turn("tool", "3"),
        ),
        WHERE,
        (TOOL,),
    )
    messages, conversations = FORMATS["messages"].write, FORMATS["conversations"].write
    assert messages is not None and conversations is not None
    assert messages(conversation, {"id": 7}) == {
        "id": 7,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi", "train": False},
            {
                "role": "assistant",
                "content": "Wait.",
                "tool_calls": [openai_call("f", '{"a": 1}', "call_1"), openai_call("g", "[1,2]", "call_2")],
                "reasoning_content": "Hm.",
                "train": True,
            },
            result("1", "call_1"),
            result("2", "call_2"),
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [openai_call("f", "{}", "call_3")],
                "reasoning_content": "So?",
                "weight": 0.5,
            },
            result("3", "call_3"),
        ],
        "tools": [TOOL],
    }
    assert conversations(conversation, {"id": 7}) == {
        "id": 7,
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "user", "value": "Hi", "train": False},
            {"from": "assistant", "value": "Wait.", "reasoning_content": "Hm.", "train": True},
            called({"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": "[1,2]"}, train=True),
            {"from": "observation", "value": "1"},
            {"from": "observation", "value": "2"},
            called({"name": "f", "arguments": {}}, reasoning_content="So?", weight=0.5),
            {"from": "observation", "value": "3"},
        ],
        "tools": json.dumps([TOOL]),
    }
