"""Weights of turns, tools, calls and their results in each format."""

from __future__ import annotations

import json
from typing import Any

import pytest

from chat.turns import ToolCall, Turn
from data_utils.schema import Conversation
from tests.records import (
    ANSWER,
    ARGUMENTS,
    ASK,
    HELLO,
    HI,
    TOOL,
    TURNS,
    WHERE,
    called,
    openai_call,
    parse,
    refused,
    result,
    two_calls,
)

# -------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize(
    ("fields", "weight"),
    [
        ({}, None),
        ({"train": None, "loss": None, "weight": None}, None),
        ({"train": True}, 1.0),
        ({"loss": True}, 1.0),
        ({"train": False}, 0.0),
        ({"loss": False, "train": False}, 0.0),
        ({"weight": 0}, 0.0),
        ({"weight": 1}, 1.0),
        ({"weight": 2.5}, 2.5),
        ({"weight": 0.5, "train": True}, 0.5),
        ({"weight": 0.0, "train": False}, 0.0),
    ],
)
def test_weights(fields: dict[str, Any], weight: float | None) -> None:
    turns = (TURNS[0]._replace(weight=weight), TURNS[1]._replace(weight=weight))
    assert parse({"conversations": [{**HI, **fields}, {**HELLO, **fields}]}).turns == turns
    assert parse({"messages": [{**ASK, **fields}, {**ANSWER, **fields}]}).turns == turns
    [turn] = parse({"conversations": [called({"name": "f"}, **fields)]}).turns
    assert turn == Turn("assistant", "", (ToolCall("f", {}),), weight)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train": 1}, '"train" of turn 2 must be true or false, not 1'),
        ({"loss": "no"}, "\"loss\" of turn 2 must be true or false, not 'no'"),
        ({"train": True, "loss": False}, '"train" and "loss" of turn 2 have the same meaning but differ'),
        ({"weight": -1}, '"weight" of turn 2 must be 0, or a number from 1e-06 to 1e+06, not -1'),
        ({"weight": 1e-9}, '"weight" of turn 2 must be 0, or a number from 1e-06 to 1e+06, not 1e-09'),
        ({"weight": True}, '"weight" of turn 2 must be 0, or a number from 1e-06 to 1e+06, not True'),
        ({"weight": "1"}, "\"weight\" of turn 2 must be 0, or a number from 1e-06 to 1e+06, not '1'"),
        ({"weight": [1]}, '"weight" of turn 2 must be 0, or a number from 1e-06 to 1e+06, not [1]'),
        ({"weight": float("nan")}, '"weight" of turn 2 must be 0, or a number from 1e-06 to 1e+06, not nan'),
        ({"weight": float("inf")}, '"weight" of turn 2 must be 0, or a number from 1e-06 to 1e+06, not inf'),
        ({"weight": 10**400}, f'"weight" of turn 2 must be 0, or a number from 1e-06 to 1e+06, not 1{"0" * 56}...'),
        ({"weight": 0, "train": True}, 'turn 2 is marked as trained, but its "weight" is 0'),
        ({"weight": 0.5, "loss": False}, 'turn 2 is marked as not trained, but its "weight" is 0.5'),
    ],
)
def test_invalid_weights(fields: dict[str, Any], message: str) -> None:
    refused({"conversations": [HI, {**HELLO, **fields}]}, "conversations", message)
    refused({"messages": [ASK, {**ANSWER, **fields}]}, "messages", message)


# ------------------------------------------------------------------------------------------------------ tools and calls


@pytest.mark.parametrize("field", ["tools", "functions"])
@pytest.mark.parametrize(
    "tool",
    [
        TOOL,
        {"type": "function", "function": TOOL},
        {"name_for_model": "weather", "name_for_human": "Weather", "description_for_model": "…", "parameters": []},
    ],
)
def test_tools_are_kept_unchanged(field: str, tool: dict[str, Any]) -> None:
    for record in (
        {"conversations": [HI, HELLO]},
        {"messages": [ASK, ANSWER]},
        {"instruction": "Hi", "output": "Hello!"},
        {"prompt": "Hi", "response": "Hello!"},
    ):
        as_list = parse({**record, field: [tool, TOOL]})
        as_text = parse({**record, field: json.dumps([tool, TOOL])})
        assert as_list == as_text == Conversation(TURNS, WHERE, (tool, TOOL))
        assert list(as_text.tools[0]) == list(tool)


@pytest.mark.parametrize("nothing", [None, [], "", "[]", " [ ] ", "null", "  "])
def test_no_tools(nothing: object) -> None:
    assert parse({"conversations": [HI, HELLO], "tools": nothing, "functions": nothing}).tools == ()
    assert parse({"messages": [ASK, ANSWER], "tools": nothing, "functions": [TOOL]}).tools == (TOOL,)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tools": {}}, '"tools" must be a list of tools, or one as JSON text, not {}'),
        ({"tools": 3}, '"tools" must be a list of tools, or one as JSON text, not 3'),
        ({"functions": '{"name": "f"}'}, '"functions" must be a list of tools, or one as JSON text, not {\'name'),
        ({"tools": "[{]"}, '"tools" is not JSON: Expecting property name enclosed in double quotes at character 3 of'),
        ({"tools": '[{"name": "f", "name": "g"}]'}, "\"tools\" has the key 'name' twice in one object"),
        ({"tools": '[{"name": NaN}]'}, '"tools" contains NaN, which is not JSON'),
        ({"tools": ["f"]}, "tool 1 in \"tools\" must be an object, not 'f'"),
        ({"tools": [None]}, 'tool 1 in "tools" must be an object, not None'),
        ({"tools": [TOOL, {"type": "function"}]}, "tool 2 in \"tools\" has no name: {'type': 'function'}"),
        ({"tools": [{"function": {"name": ""}}]}, "tool 1 in \"tools\" has no name: {'function': {'name': ''}}"),
        ({"tools": [{"function": "f"}]}, "tool 1 in \"tools\" must be an object, not 'f'"),
        ({"functions": [{"name": 3}]}, '"name" of tool 1 in "functions" must be a string, not 3'),
        (
            {"tools": [TOOL, {"name": "f", "name_for_model": True}]},
            '"name_for_model" of tool 2 in "tools" must be a string, not True',
        ),
        (
            {"tools": [{"name": "f", "description": [1]}]},
            '"description" of tool 1 in "tools" must be a string, not [1]',
        ),
        ({"tools": [TOOL], "functions": [TOOL]}, 'the record has "tools" and "functions"'),
        ({"tools": [{"name": "f", "x": float("inf")}]}, '"tools" contains inf, which is not JSON'),
    ],
)
def test_invalid_tools(fields: dict[str, Any], message: str) -> None:
    refused({"conversations": [HI, HELLO], **fields}, "conversations", message)
    refused({"messages": [ASK, ANSWER], **fields}, "messages", message)
    refused({"instruction": "Hi", "output": "Hello!", **fields}, "alpaca", message)


def test_calls_of_conversations() -> None:
    calls = (ToolCall("weather", ARGUMENTS), ToolCall("time", {}))
    record = {
        "conversations": [
            HI,
            HELLO,
            called({"name": "weather", "arguments": ARGUMENTS}),
            {"from": "observation", "value": "rain"},
            called({"name": "weather", "arguments": ARGUMENTS}, {"function": {"name": "time"}}),
            {"from": "tool", "value": "snow"},
            {"from": "function", "value": "noon"},
            HELLO,
        ]
    }
    turns = parse(record).turns
    assert turns == (
        *TURNS,
        Turn("assistant", "", calls[:1]),
        Turn("tool", "rain"),
        Turn("assistant", "", calls),
        Turn("tool", "snow"),
        Turn("tool", "noon"),
        TURNS[1],
    )
    assert turns[2].calls[0].arguments_text == json.dumps(ARGUMENTS, ensure_ascii=False)


@pytest.mark.parametrize("arguments", [[1, None], '"text"', " [] ", 0, False, 1.5, {"a": [None]}, '{"a": null}'])
def test_arguments_of_any_type(arguments: object) -> None:
    [turn] = parse({"conversations": [called({"name": "f", "arguments": arguments})]}).turns
    assert turn.calls == (ToolCall("f", arguments),) and type(turn.calls[0].arguments) is type(arguments)
    [turn] = parse({"messages": [{"role": "assistant", "tool_calls": [openai_call("f", arguments)]}]}).turns
    assert turn.calls == (ToolCall("f", arguments),)


def test_no_arguments() -> None:
    empty = ({"name": "f", "arguments": text} for text in (None, "", " \n"))
    for call in ({"name": "f"}, *empty, {"type": "function", "function": {"name": "f"}}):
        assert parse({"conversations": [called(call)]}).turns[0].calls == (ToolCall("f", {}),)
        assert parse({"messages": [{**ANSWER, "tool_calls": [call]}]}).turns[0].calls == (ToolCall("f", {}),)


def test_calls_of_messages() -> None:
    text = '{"city":  "Ulm"}'  # two spaces, which are kept
    turns = parse(
        {
            "messages": [
                ASK,
                {**ANSWER, "tool_calls": [openai_call("weather", text, "1")]},
                result("rain", "1"),
                {"role": "assistant", "content": None, "tool_calls": [openai_call("a", text), openai_call("b", "{}")]},
                {"role": "tool", "content": "A"},
                {"role": "function", "name": "b", "content": "B"},
                {"role": "assistant", "function_call": {"name": "c", "arguments": text}, "tool_calls": []},
                {"role": "function", "name": "c", "content": [{"type": "text", "text": "C"}]},
                ANSWER,
            ]
        }
    ).turns
    assert turns == (
        TURNS[0],
        Turn("assistant", "Hello!", (ToolCall("weather", text),)),
        Turn("tool", "rain"),
        Turn("assistant", "", (ToolCall("a", text), ToolCall("b", "{}"))),
        Turn("tool", "A"),
        Turn("tool", "B"),
        Turn("assistant", "", (ToolCall("c", text),)),
        Turn("tool", "C"),
        TURNS[1],
    )


@pytest.mark.parametrize(
    "record",
    [
        two_calls(result("A", "1"), result("B", "2")),
        two_calls(result("B", "2"), result("A", "1")),
        two_calls(result("A"), result("B")),
        two_calls(result("A", ""), result("B", "")),
        two_calls(result("A"), result("B"), ids=(None, None)),
        two_calls(result("A"), result("B"), ids=("1", "1")),
    ],
)
def test_results_are_ordered_like_their_calls(record: dict[str, Any]) -> None:
    assert parse(record).turns[2:4] == (Turn("tool", "A"), Turn("tool", "B"))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            two_calls(result("A", "1"), result("B", "3")),
            "\"tool_call_id\" '3' of turn 4 is not an id of the calls of turn 2, ['1', '2']",
        ),
        (two_calls(result("A", "1"), result("B", "1")), "the results of turn 2 have the id '1' twice"),
        (two_calls(result("A", "1"), result("B")), "the results of turn 2 have no ids, or only some have one"),
        (two_calls(result("A", 1), result("B", 2)), "the results of turn 2 have an id that is not a string: 1"),
        (two_calls(result("A", ["1"]), result("B")), "the results of turn 2 have an id that is not a string: ['1']"),
        (
            two_calls(result("A", "1"), result("B", "2"), ids=(None, None)),
            "the calls of turn 2 have no ids, or only some have one",
        ),
        (
            two_calls(result("A", "1"), result("B", "2"), ids=("1", "1")),
            "the calls of turn 2 have the id '1' twice",
        ),
        (two_calls(result("A")), "turn 2 calls 2 functions, and 1 result follows it"),
        (two_calls(), "turn 2 calls 2 functions, and no results follow it"),
        (
            two_calls(result("A"), result("B"), result("C")),
            "turn 2 calls 2 functions, and 3 results follow it",
        ),
        ({"messages": [ASK, result("A")]}, "turn 2 is the result of a call, but no call precedes it"),
        ({"messages": [result("A")]}, "turn 1 is the result of a call, but no call precedes it"),
    ],
)
def test_results_that_match_no_call(record: dict[str, Any], message: str) -> None:
    refused(record, "messages", message)


def test_results_in_conversations() -> None:
    call, observed = called({"name": "f"}), {"from": "observation", "value": "x"}
    assert len(parse({"conversations": [HI, call]}).turns) == 2
    refused({"conversations": [HI, observed]}, "conversations", "turn 2 is the result of a call, but no call precedes")
    refused({"conversations": [HI, call, HELLO]}, "conversations", "turn 2 calls 1 function, and no results follow it")
    refused({"conversations": [call, call, observed]}, "conversations", "turn 1 calls 1 function, and no results")
    refused({"conversations": [call, observed, observed]}, "conversations", "turn 1 calls 1 function, and 2 results")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x", "the call in turn 1 is not JSON: Expecting value at character 1 of 'x'"),
        ("", "the call in turn 1 is not JSON: Expecting value at character 1 of ''"),
        ("{'name': 'f'}", "the call in turn 1 is not JSON: Expecting property name"),
        ('{"name": "f"} x', "the call in turn 1 is not JSON: Extra data at character 15 of"),
        ("[]", "turn 1 calls nothing: '[]'"),
        ("3", "a call in turn 1 must be an object, not 3"),
        ("null", "a call in turn 1 must be an object, not None"),
        ("[[]]", "a call in turn 1 must be an object, not []"),
        ('{"arguments": {}}', "a call in turn 1 has no name: {'arguments': {}}"),
        ('{"name": ""}', "a call in turn 1 has no name: {'name': ''}"),
        ('{"name": ["f"]}', "a call in turn 1 has no name: {'name': ['f']}"),
        ('{"function": "f", "arguments": {}}', "a call in turn 1 must be an object, not 'f'"),
        ('{"name": "f", "parameters": {"a": 1}}', "a call in turn 1 has no \"arguments\", but ['parameters']"),
        ('{"name": "f", "arguments": {"a": 1, "a": 2}}', "the call in turn 1 has the key 'a' twice in one object"),
        ('{"name": "f", "arguments": 1e999}', "the call in turn 1 contains a number that is too large: '1e999'"),
        ('{"name": "f", "arguments": -Infinity}', "the call in turn 1 contains -Infinity, which is not JSON"),
        ('{"name": "f", "arguments": ' + "9" * 5000 + "}", "the call in turn 1 cannot be read as JSON: Exceeds"),
        ("[" * 100_000, "the call in turn 1 cannot be read as JSON: maximum recursion depth exceeded"),
        (
            '{"name": "f", "arguments": ' + "[" * 300 + "]" * 300 + "}",
            "the call in turn 1 is nested more than 200 levels deep",
        ),
    ],
)
def test_invalid_function_call(text: str, message: str) -> None:
    refused({"conversations": [{"from": "function_call", "value": text}]}, "conversations", message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tool_calls": "f"}, "\"tool_calls\" of turn 1 must be a list, not 'f'"),
        ({"tool_calls": {"name": "f"}}, "\"tool_calls\" of turn 1 must be a list, not {'name': 'f'}"),
        ({"tool_calls": [None]}, "a call in turn 1 must be an object, not None"),
        ({"tool_calls": [{"id": "1"}]}, "a call in turn 1 has no name: {'id': '1'}"),
        ({"function_call": "f"}, "a call in turn 1 must be an object, not 'f'"),
        (
            {"function_call": {"name": "f"}, "tool_calls": [{"name": "f"}]},
            'turn 1 has "tool_calls" and "function_call"',
        ),
        ({"role": "user", "tool_calls": [{"name": "f"}]}, "turn 1 is from 'user' and calls a function"),
        (
            {"tool_calls": [{"name": "f", "arguments": [float("nan")]}]},
            '"arguments" in turn 1 contains nan, which is not JSON',
        ),
        ({"tool_calls": [{"name": "f", "args": "{}"}]}, "a call in turn 1 has no \"arguments\", but ['args']"),
        (
            {"tool_calls": [{"name": "f", "arguments": "", "parameters": {"a": 1}}]},
            "a call in turn 1 has no \"arguments\", but ['parameters']",
        ),
        (
            {"tool_calls": [{"name": "f", "arguments": "{'a': 1}"}]},
            '"arguments" in turn 1 is not JSON: Expecting property name enclosed in double quotes at character 2 of',
        ),
        ({"tool_calls": [{"name": "f", "arguments": '{"a": 1'}]}, '"arguments" in turn 1 is not JSON: Expecting'),
        ({"tool_calls": [{"name": "f", "arguments": '{"a": NaN}'}]}, '"arguments" in turn 1 contains NaN, which is'),
        (
            {"tool_calls": [{"name": "f", "arguments": "[" * 100_000}]},
            '"arguments" in turn 1 cannot be read as JSON: maximum recursion depth exceeded',
        ),
        (
            {"tool_calls": [{"name": "f", "arguments": "[" * 300 + "]" * 300}]},
            '"arguments" in turn 1 is nested more than 200 levels deep',
        ),
    ],
)
def test_invalid_tool_calls(fields: dict[str, Any], message: str) -> None:
    refused({"messages": [{**ANSWER, **fields}]}, "messages", message)
