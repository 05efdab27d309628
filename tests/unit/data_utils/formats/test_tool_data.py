"""Tools and calls as other sources write them: nothing is lost without a word."""

from __future__ import annotations

import json
from typing import Any

import pytest

from chat.families import QWEN_V1, Family
from chat.render import render, text_of
from chat.tools_hermes import HERMES_FORMS
from chat.turns import ToolCall, Turn
from data_utils.formats import FORMATS
from data_utils.schema import (
    ARGUMENTS_NOT_OBJECTS,
    NULLS_LEFT_OUT,
    PARAMETERS_NOT_OBJECTS,
    UNDECLARED_CALLS,
    Conversation,
)
from tests.records import ANSWER, ASK, HELLO, HI, TOOL, WHERE, called, openai_call, parse, refused, result

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FORMS = [QWEN_V1, *(Family("chatml", tool_form=form) for form in HERMES_FORMS)]


def with_tools(*tools: Any, calls: list[Any] | None = None) -> dict[str, Any]:
    turns = [ASK, ANSWER] if calls is None else [ASK, {"role": "assistant", "tool_calls": calls}]
    return {"messages": turns, "tools": list(tools)}


@pytest.mark.parametrize("family", FORMS, ids=lambda family: f"{family.name} {family.tool_form}")
@pytest.mark.parametrize("name", ["input_schema", "inputSchema", "parameters"])
def test_parameters_under_each_name_reach_the_prompt(name: str, family: Family) -> None:
    description = {"name": "clock", "description": "Tells the time.", name: SCHEMA}
    for tool in (description, {"type": "function", "function": description}):
        for tools in ([tool], json.dumps([tool]), [json.dumps(tool)]):
            parsed = parse({"messages": [ASK, ANSWER], "tools": tools})
            described = text_of(render(parsed.turns, family, tools=parsed.tools))
            assert json.dumps(SCHEMA) in described and name not in described.replace("parameters", "")
            assert parsed.notes == ()


@pytest.mark.parametrize("name", ["clock\nAction: g", 'clock", "x": "', "clock\\", "a\x1b", "a\u2028b"])
def test_function_name_that_would_break_a_call_is_refused(name: str) -> None:
    call = {"type": "function", "function": {"name": name, "arguments": "{}"}}
    for record in (with_tools({"name": name, "parameters": SCHEMA}), with_tools(calls=[call])):
        what = f"the function name {name!r} contains a quotation mark, a backslash or a control character"
        refused(record, "messages", what)
    for fine in ("天气", "google search", "get.weather-2"):
        assert parse(with_tools({"name": fine, "parameters": SCHEMA})).tools


def test_parameters_as_json_text_are_decoded_and_keep_their_place() -> None:
    tool = {"name": "clock", "inputSchema": json.dumps(SCHEMA), "description": "Tells the time."}
    [parsed] = parse(with_tools(tool)).tools
    assert list(parsed.items()) == [("name", "clock"), ("parameters", SCHEMA), ("description", "Tells the time.")]
    [both] = parse(with_tools({**tool, "parameters": {}})).tools
    assert both == parsed
    refused(
        with_tools({**tool, "parameters": {"type": "object"}}),
        "messages",
        '"parameters" and "inputSchema" of tool 1 in "tools" have the same meaning but differ',
    )
    refused(with_tools({**tool, "inputSchema": "{"}), "messages", '"inputSchema" of tool 1 in "tools" is not JSON')


def test_null_fields_of_a_typed_table_are_left_out() -> None:
    """A column of structs gives every tool and every call the fields of all others."""
    properties = {"city": {"type": "string", "enum": None, "default": None}, "zone": None}
    tool = {"name": "clock", "parameters": {"type": "object", "properties": properties, "required": None}}
    parsed = parse(with_tools(tool, calls=[openai_call("clock", {"city": "Ulm", "zone": None, "all": [None]})]))
    assert parsed.tools[0]["parameters"] == {"type": "object", "properties": {"city": {"type": "string"}}}
    assert parsed.turns[1].calls == (ToolCall("clock", {"city": "Ulm", "all": [None]}),)
    assert parsed.notes == (NULLS_LEFT_OUT,)


@pytest.mark.parametrize(
    "schema",
    [{"type": ["string", "null"]}, {"anyOf": [{"type": "string"}, {"type": "null"}]}, {"nullable": True}],
)
def test_null_default_of_a_type_that_may_be_null_is_kept(schema: dict[str, Any]) -> None:
    tool = {"name": "f", "parameters": {"properties": {"a": {**schema, "default": None}}}}
    assert parse(with_tools(tool)).tools == (tool,)


def test_nulls_in_json_text_are_kept_and_written_again() -> None:
    tool, call = {"name": "f", "strict": None}, {"name": "f", "arguments": {"a": None}}
    parsed = parse({"conversations": [HI, called(call)], "tools": json.dumps([tool])})
    assert (parsed.tools, parsed.turns[1].calls, parsed.notes) == ((tool,), (ToolCall("f", {"a": None}),), ())
    write = FORMATS["messages"].write
    assert write is not None
    again = parse(json.loads(json.dumps(write(parsed, {}))))
    assert again.tools == (tool,) and again.turns[1].calls[0].arguments_text == '{"a": null}'


@pytest.mark.parametrize("family", FORMS, ids=lambda family: f"{family.name} {family.tool_form}")
@pytest.mark.parametrize("arguments", ["", " \n", None, {}, "{}"])
def test_empty_arguments_are_an_empty_object(arguments: object, family: Family) -> None:
    for record in (
        with_tools({"name": "f"}, calls=[openai_call("f", arguments)]),
        {"conversations": [HI, called({"name": "f", "arguments": arguments})], "tools": [{"name": "f"}]},
    ):
        parsed = parse(record)
        text = text_of(render(parsed.turns, family, tools=parsed.tools))
        assert ("Action Input: {}\n" if family is QWEN_V1 else '"arguments": {}}\n') in text
        assert parsed.notes == ()


@pytest.mark.parametrize("text", ["{'a': 1}", '{"a": 1', "a=1", "[1,]", '{"a": 1} {}', "NaN"])
def test_arguments_that_are_not_json_are_refused_in_every_format(text: str) -> None:
    refused(with_tools(calls=[openai_call("f", text)]), "messages", '"arguments" in turn 2 ')
    refused({"messages": [ASK, {**ANSWER, "function_call": {"name": "f", "arguments": text}}]}, "messages", '"arg')
    refused({"conversations": [HI, called({"name": "f", "arguments": text})]}, "conversations", '"arguments" in turn 2')
    part = {"type": "tool_call", "value": {"name": "f", "arguments": text}}
    refused({"messages": [ASK, {"role": "assistant", "content": [part]}]}, "messages", '"arguments" in turn 2 ')
    refused(
        {"prompt": [ASK], "completion": [{"role": "assistant", "tool_calls": [openai_call("f", text)]}]},
        "pairs",
        '"arguments" in turn 2 ',
    )


@pytest.mark.parametrize("arguments", ["[]", "null", "3", '"text"', [1], True, 0])
def test_arguments_that_are_not_objects_are_noted(arguments: object) -> None:
    parsed = parse(with_tools({"name": "f"}, calls=[openai_call("f", arguments)]))
    assert parsed.turns[1].calls == (ToolCall("f", arguments),) and parsed.notes == (ARGUMENTS_NOT_OBJECTS,)


def test_parameters_that_are_not_objects_are_noted() -> None:
    assert parse(with_tools({"name": "f", "parameters": "a city"})).notes == (PARAMETERS_NOT_OBJECTS,)
    assert parse(with_tools({"name_for_model": "f", "parameters": []})).notes == ()


def test_calls_of_undeclared_tools_are_noted() -> None:
    weather = openai_call("weather", "{}")
    declared = [TOOL, {"function": TOOL}, {"name": "other", "name_for_model": "weather"}]
    assert [parse(with_tools(tool, calls=[weather])).notes for tool in declared] == [()] * 3
    assert parse(with_tools({"name": "Weather"}, calls=[weather])).notes == (UNDECLARED_CALLS,)
    assert parse({"conversations": [HI, called({"name": "f"})]}).notes == (UNDECLARED_CALLS,)
    assert parse(with_tools(TOOL)).notes == ()


def test_calls_as_turns_of_their_own_join_the_answer_before_them() -> None:
    """As one toolkit writes them: a ``tool_call`` continues an answer, and several in a row are made at once."""
    calls = [{"role": "tool_call", "content": json.dumps({"name": "f", "arguments": {"n": n}})} for n in (1, 2)]
    results = [{"role": "tool_response", "content": text} for text in "ab"]
    parsed = parse({"messages": [ASK, ANSWER, *calls, *results, ANSWER], "tools": json.dumps([{"name": "f"}])})
    both = (ToolCall("f", {"n": 1}), ToolCall("f", {"n": 2}))
    assert parsed.turns == (
        Turn("user", "Hi"), Turn("assistant", "Hello!", both), Turn("tool", "a"), Turn("tool", "b"),
        Turn("assistant", "Hello!"),
    )  # fmt: skip
    in_pairs = [{"from": turn["role"], "value": turn["content"]} for turn in (*calls, *results)]
    assert parse({"conversations": [HI, *in_pairs, HELLO]}).turns[1].calls == both
    refused({"messages": [ASK, calls[0], results[0], results[1]]}, "messages", "turn 2 calls 1 function, and 2 results")
    refused(
        {"messages": [ASK, {**ANSWER, "train": True}, calls[0]]},
        "messages",
        "turns 2 and 3 are one answer, but have different weights",
    )
    mixed = [ASK, {"role": "assistant", "tool_calls": [openai_call("f", "{}", "x")]}, result("1", "y")]
    refused(
        {"messages": mixed}, "messages", "\"tool_call_id\" 'y' of turn 3 is not an id of the calls of turn 2, ['x']"
    )


def test_typed_parts_are_read() -> None:
    """As one toolkit writes messages: parts with a type and a value, and a weight for each message."""
    parts = [
        {"type": "reasoning", "value": "Hm."},
        {"type": "text", "value": "I look."},
        {"type": "tool_call", "value": json.dumps({"name": "f", "arguments": {"a": 1}})},
        {"type": "tool_call", "value": json.dumps({"name": "g", "arguments": ""})},
    ]
    record = {
        "messages": [
            {"role": "system", "content": [{"type": "text", "value": "Be brief."}], "loss_weight": 0.0},
            {"role": "user", "content": [{"type": "text", "value": "Hi"}], "loss_weight": 0.0},
            {"role": "assistant", "content": parts, "loss_weight": 0.5},
            {"role": "tool", "content": [{"type": "text", "value": "1"}], "loss_weight": 0.0},
            {"role": "tool", "content": [{"type": "text", "value": "2"}], "loss_weight": 0.0},
            {"role": "assistant", "content": [{"type": "text", "value": "Done."}], "loss_weight": 1.0},
        ],
        "tools": json.dumps([{"name": "f"}, {"name": "g"}]),
    }
    parsed = parse(record)
    assert parsed == Conversation(
        (
            Turn("system", "Be brief.", weight=0.0),
            Turn("user", "Hi", weight=0.0),
            Turn("assistant", "I look.", (ToolCall("f", {"a": 1}), ToolCall("g", {})), 0.5, "Hm."),
            Turn("tool", "1", weight=0.0),
            Turn("tool", "2", weight=0.0),
            Turn("assistant", "Done.", weight=1.0),
        ),
        WHERE,
        ({"name": "f"}, {"name": "g"}),
    )
    assert parsed.notes == ()
    for format_ in FORMATS.values():
        if format_.write is not None:
            again = parse(json.loads(json.dumps(format_.write(parsed, {}))))
            assert [turn for turn in again.turns if turn.content] == [
                turn._replace(calls=turn.calls and again.turns[2].calls, thinking=turn.thinking)
                for turn in parsed.turns
            ]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            [{"type": "text", "text": "a"}, {"type": "reasoning", "value": "b"}],
            "turn 2 has a part of type 'reasoning' a",
        ),
        (
            [{"type": "tool_call", "value": '{"name": "f"}'}, {"type": "text", "value": "a"}],
            "turn 2 has a part of type",
        ),
        (
            [{"type": "tool_call", "value": "f"}],
            "the call in turn 2 is not JSON: Expecting value at character 1 of 'f'",
        ),
        ([{"type": "tool_call", "value": 3}], 'the "value" of a part of turn 2 must be a string, not 3'),
        ([{"type": "tool_use", "name": "f", "input": {}}], "turn 2 has a part of type 'tool_use'"),
        ([{"type": "text", "text": "a", "value": "b"}], '"text" and "value" of a part of turn 2 have the same meaning'),
        ([{"type": "input_audio", "input_audio": {}}], "turn 2 has a part of type 'input_audio': only text can be"),
        ([{"type": "reasoning", "value": None}], 'the "value" of a part of turn 2 must be a string, not None'),
    ],
)
def test_parts_that_cannot_be_written_are_refused(parts: list[Any], message: str) -> None:
    refused({"messages": [ASK, {"role": "assistant", "content": parts}]}, "messages", message)


def test_reasoning_in_parts_and_in_a_field() -> None:
    answer = {"role": "assistant", "content": [{"type": "thinking", "thinking": "a"}, {"type": "text", "text": "b"}]}
    assert parse({"messages": [ASK, answer]}).turns[1] == Turn("assistant", "b", thinking="a")
    assert parse({"messages": [ASK, {**answer, "reasoning_content": "a"}]}).turns[1].thinking == "a"
    refused(
        {"messages": [ASK, {**answer, "reasoning_content": "c"}]},
        "messages",
        "the reasoning in the content of turn 2 and its field differ",
    )
    refused(
        {"messages": [{"role": "user", "content": [{"type": "reasoning", "value": "a"}]}]},
        "messages",
        "turn 1 has \"reasoning\" ('a'), which only assistant turns can have",
    )
