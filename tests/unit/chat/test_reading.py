"""What a model wrote becomes content, thinking and calls: the inverse of writing, however the text is split."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from chat.answers import write_answer
from chat.detect import HERMES_FORMS
from chat.events import CallStart, Content, Event, Thinking
from chat.families import ANSWER_STYLES, EMPTY_THOUGHT, QWEN_V1, STRICT_STYLES, Family
from chat.reading import AnswerReader, opening_of, read_answer, turn_of
from chat.render import render, text_of
from chat.turns import ToolCall, Turn
from tests.golden import Golden

LATER = [
    Family(style.name, thinking=style.thinking, tool_form=form)
    for style in (*ANSWER_STYLES, *STRICT_STYLES)
    for form in HERMES_FORMS
]
TOOLS = ({"type": "function", "function": {"name": "f"}},)
PLAIN = next(family for family in LATER if not family.has_thinking)
THINKS = next(family for family in LATER if family.thinking == "block")

# Pieces that matter to a parser, whole and cut, beside ordinary text.
TAGS = (
    "<tool_call>", "</tool_call>", "<think>", "</think>", "\n", "\nAction:", "\nAction Input:", "\nObservation:",
    "\nFinal Answer:", "Thought:", '{"name": "f", "arguments": {"a": 1}}', '"', "\\", "\ud83d", "é", " ", "<", "A", "f",
)  # fmt: skip
noise = st.lists(st.sampled_from(TAGS) | st.text(max_size=3), max_size=12).map("".join)
words = st.text('ab é你<>{}"\\\n', max_size=8)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | words,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(words, inner, max_size=2),
    max_leaves=4,
)
arguments = st.dictionaries(words | st.just("</tool_call>"), json_values | st.just("</tool_call>"), max_size=3)
names = st.text("abé_-", min_size=1, max_size=5)
calls = st.lists(st.builds(ToolCall, names, arguments), max_size=3).map(tuple)


def read_in_pieces(text: str, cuts: list[int], family: Family, opening: str = "") -> Turn:
    reader = AnswerReader(family, TOOLS, opening)
    borders = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    events = [event for start, end in pairwise(borders) for event in reader.feed(text[start:end])]
    return turn_of([*events, *reader.close()])


def with_values(turn: Turn) -> Turn:
    """Return a turn with the arguments of its calls as values."""
    return turn._replace(calls=tuple(ToolCall(call.name, json.loads(call.arguments_text)) for call in turn.calls))


@given(st.sampled_from(LATER), words.map(str.strip), calls, st.none() | words.map(lambda text: text.strip("\n")))
def test_reading_inverts_writing(
    family: Family, content: str, calls: tuple[ToolCall, ...], thought: str | None
) -> None:
    turn = Turn("assistant", content, calls, thinking=(thought or None) if family.has_thinking_field else None)
    text = write_answer(turn, family, is_last=True, after_last_question=True)
    assert with_values(read_answer(text, family, tools=TOOLS)) == turn


@given(words.map(str.strip), names, arguments)
def test_reading_inverts_writing_of_react(content: str, name: str, values: dict[str, Any]) -> None:
    turn = Turn("assistant", content, (ToolCall(name, values),))
    text = react_answer(turn)
    assert with_values(read_answer(text, QWEN_V1, tools=TOOLS)) == turn
    answer = Turn("assistant", content)
    assert read_answer(react_answer(answer), QWEN_V1, tools=TOOLS) == answer


def react_answer(turn: Turn) -> str:
    """Return the text that a model is trained to write for a turn."""
    return text_of(render([turn], QWEN_V1)).partition("assistant\n")[2].removesuffix("<|im_end|>\n")


@given(noise, st.lists(st.integers(0, 100), max_size=12), st.sampled_from([QWEN_V1, PLAIN, THINKS]), st.booleans())
@example("Thought: a\nAction: b\nAction Input: c\nObservation: d", list(range(60)), QWEN_V1, False)
@example('a\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n', list(range(70)), PLAIN, False)
def test_splitting_changes_nothing(text: str, cuts: list[int], family: Family, is_open: bool) -> None:
    opening = opening_of(family, True, after_result=is_open)
    assert read_in_pieces(text, cuts, family, opening) == read_answer(text, family, TOOLS, opening)
    assert read_in_pieces(text, list(range(len(text))), family, opening) == read_answer(text, family, TOOLS, opening)


@given(noise, st.sampled_from([PLAIN, THINKS]))
def test_no_character_is_lost(text: str, family: Family) -> None:
    """Apart from white space, tags, and the keys of calls."""
    turn = read_answer(text, family, tools=TOOLS)
    called = "".join(
        f"<tool_call>{json.dumps({'name': call.name, 'arguments': json.loads(call.arguments)})}</tool_call>"
        for call in turn.calls
    )
    kept = f"{turn.content}{turn.thinking or ''}{called}<think></think>"
    assert not [mark for mark in set(text) if not mark.isspace() and text.count(mark) > kept.count(mark)]


def test_recorded_answers_of_the_original_server(any_golden: Golden) -> None:
    """Content and call are equal, except where the original loses or adds text."""
    for case in any_golden.load_json("react.json")["parse_response"]:
        written, content, call = case["response"], case["content"], case["function_call"]
        if case["tag"] == "observation before input":
            call = {**call, "arguments": written.rpartition("Action Input: ")[2]}
        elif case["tag"] == "empty action name":
            content = content.removesuffix("\nObservation:")
        elif case["tag"] == "two final answers":
            content = written.partition("Final Answer: ")[2]
        turn = read_answer(written, QWEN_V1, tools=TOOLS)
        assert (turn.content, turn.calls[0]._asdict() if turn.calls else None) == (content, call), case["tag"]


@pytest.mark.parametrize(
    "call",
    [
        "{", "", "[" * 5000,
        "[]", "3", '{"name": 1, "arguments": {}}', '{"name": "", "arguments": {}}', '{"arguments": {}}',
        '{"name": "f", "arguments": {"a": NaN}}', '{"name": "f", "arguments": "\\ud800"}', '{"name": "f"} x',
        '{"name": "f", "arguments": {"a": "}',
    ],
)  # fmt: skip
def test_malformed_call_is_content(call: str) -> None:
    text = f"Look:\n<tool_call>{call}</tool_call>\nDone."
    assert read_answer(text, PLAIN, tools=TOOLS) == Turn("assistant", text)


def test_unfinished_call_is_read_if_it_is_complete() -> None:
    text = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}'
    assert read_answer(text, PLAIN, tools=TOOLS).calls == (ToolCall("f", '{"a": 1}'),)
    assert read_answer(text[:-1], PLAIN, tools=TOOLS) == Turn("assistant", text[:-1])


def test_calls_are_content_without_tools() -> None:
    text = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    assert read_answer(text, PLAIN) == Turn("assistant", text)
    assert read_answer("Thought: a\nAction: f\nAction Input: {}", QWEN_V1).calls == ()


def events_of(pieces: list[str], family: Family) -> list[list[Event]]:
    reader = AnswerReader(family, TOOLS)
    return [reader.feed(piece) for piece in pieces]


def test_text_is_passed_on_at_once() -> None:
    """Content and thinking wait only while they may be the start of a tag; ReAct arguments for no end of theirs."""
    assert events_of(["Hello", " you <", "b"], PLAIN) == [[Content("Hello")], [Content(" you ")], [Content("<b")]]
    assert events_of(["<think>\n", "Let", " me", "</think>"], THINKS)[1:3] == [[Thinking("Let")], [Thinking(" me")]]
    named = events_of(["Thought: I look.\nAction: f\nAction Input:", ' {"a"', ": 1}"], QWEN_V1)
    assert named[0] == [Content("I look."), CallStart("f")] and [event.text for event in named[1] + named[2]] == [
        '{"a"',
        ": 1}",
    ]  # type: ignore[union-attr]


def test_prompt_that_opens_the_answer() -> None:
    """After a result a v1 model continues a thought; a reasoning model starts inside one, or after an empty one."""
    after_result = opening_of(QWEN_V1, True, after_result=True)
    turn = read_answer(" I now know the final answer.\nFinal Answer: It is 22.", QWEN_V1, TOOLS, after_result)
    assert turn == Turn("assistant", "It is 22.")
    assert read_answer(" It is 22.", QWEN_V1, TOOLS, after_result).content == " It is 22."
    reasons = next(style for style in ANSWER_STYLES if style.prompt_suffix)
    opened = opening_of(reasons, False, False)
    assert read_answer("Hm.\n</think>\n\n22", reasons, opening=opened) == Turn("assistant", "22", thinking="Hm.")
    closed = opening_of(replace(THINKS, prompt_suffix=EMPTY_THOUGHT), False, False)
    assert read_answer("22", THINKS, opening=closed) == Turn("assistant", "22")
