"""Calls as tags for the function and its parameters: what is written, and what is read from it."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chat.families import Family
from chat.reading import AnswerReader, turn_of
from chat.render import check_turns
from chat.tools_xml import XML_FORMS
from chat.turns import ToolCall, Turn

PYTHON, JSON = (Family("chatml-3.5", thinking="blocks", is_strict=True, tool_form=form) for form in XML_FORMS)
TYPES = {"text": "string", "count": "integer", "share": "number", "is": "boolean", "rows": "array", "of": "object"}
TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"properties": {name: {"type": type_} for name, type_ in TYPES.items()}}},
}
words = st.text('ab é你"\\1', max_size=6)
values = st.fixed_dictionaries(
    {},
    optional={
        "text": words | st.sampled_from(["12", "null", "True", "{}", "a\n\nb", ""]),
        "count": st.integers(),
        "share": st.integers() | st.floats(allow_nan=False, allow_infinity=False),
        "is": st.booleans(),
        "rows": st.lists(st.integers() | words | st.none(), max_size=3),
        "of": st.dictionaries(words, st.booleans() | words, max_size=2),
    },
)


def read(text: str, family: Family = JSON, cuts: tuple[int, ...] = (), tools: tuple[Any, ...] = (TOOL,)) -> Turn:
    reader = AnswerReader(family, tools)
    borders = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    events = [event for start, end in pairwise(borders) for event in reader.feed(text[start:end])]
    return turn_of([*events, *reader.close()])


@given(
    st.sampled_from([PYTHON, JSON]),
    st.lists(values, min_size=1, max_size=3),
    words.map(str.strip),
    st.lists(st.integers(0, 300), max_size=9),
)
def test_reading_inverts_writing(
    family: Family, arguments: list[dict[str, Any]], content: str, cuts: list[int]
) -> None:
    form = family.tool_form
    assert form is not None
    calls = tuple(ToolCall("f", one) for one in arguments)
    text = f"{content}{form.separator if content else ''}{form.calls_text(calls)}"
    turn = read(text, family, tuple(cuts))
    assert turn.content == content
    assert [(call.name, json.loads(call.arguments)) for call in turn.calls] == [("f", one) for one in arguments]


@pytest.mark.parametrize(
    ("written", "type_", "value"),
    [
        ("12", "string", "12"), ("12", "integer", 12), ("12", None, "12"), ("12.5", "integer", "12.5"),
        ("True", "boolean", True), ("true", "boolean", True), ("1", "boolean", "1"), ("true", "integer", "true"),
        ("None", ["string", "null"], None), ("no", ["string", "null"], "no"), ("NaN", "number", "NaN"),
        ("[1", "array", "[1"),
    ],
)  # fmt: skip
def test_declared_type_decides_what_a_value_is(written: str, type_: Any, value: Any) -> None:
    tool = {"name": "f", "parameters": {"properties": {"a": {"type": type_} if type_ else {}}}}
    turn = read(
        f"<tool_call>\n<function=f>\n<parameter=a>\n{written}\n</parameter>\n</function>\n</tool_call>", tools=(tool,)
    )
    assert json.loads(turn.calls[0].arguments) == {"a": value}


def test_end_tag_within_a_value_is_part_of_it() -> None:
    text = JSON.tool_form.calls_text([ToolCall("f", {"text": "a</tool_call>b"})]) if JSON.tool_form else ""
    assert json.loads(read(text).calls[0].arguments) == {"text": "a</tool_call>b"}


@pytest.mark.parametrize(
    "call",
    [
        "", "f", "<function=f>", "<function=>\n</function>", "<function=f>\n<parameter=a>\n1\n</function>",
        "<function=f>\nx\n</function>",
        "<function=f>\n<parameter=a>\n1\n</parameter>\n<parameter=a>\n2\n</parameter>\n</function>",
    ],
)  # fmt: skip
def test_malformed_call_is_content(call: str) -> None:
    text = f"Look:\n\n<tool_call>\n{call}\n</tool_call>"
    turn = read(text)
    assert (turn.calls, turn.content) == ((), text)


@pytest.mark.parametrize("arguments", [[], None, 3, "[1]", "no JSON", '{"a": 1, "a": 2}'])
def test_arguments_that_are_no_object_are_refused(arguments: Any) -> None:
    turns = [Turn("user", "Hi"), Turn("assistant", "", (ToolCall("f", arguments),))]
    with pytest.raises(ValueError, match=r"the arguments of a call of 'f' are not a JSON object"):
        check_turns(turns, JSON, [])


def test_arguments_as_json_text_are_decoded() -> None:
    assert JSON.tool_form is not None
    assert JSON.tool_form.calls_text([ToolCall("f", '{"count": 1}')]) == JSON.tool_form.calls_text(
        [ToolCall("f", {"count": 1})]
    )
