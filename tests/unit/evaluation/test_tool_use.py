"""Figures of tool use, computed by hand: ReAct text, JSON and XML calls that say the same have the same scores."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import GenerationConfig

from chat.families import ANSWER_STYLES, QWEN_V1, STRICT_STYLES, Family
from chat.tools_hermes import HERMES_FORMS
from chat.tools_xml import XML_FORMS
from chat.turns import ToolCall, Turn
from errors import DataError
from evaluation.metrics import mean_scores
from evaluation.prompt_flags import Prompts
from evaluation.tool_use import Caller, ToolQuestion, read_tool_questions, tool_scores
from serving.requests import Answer, Usage
from tests.chats import Subject, load_subject
from tests.golden import SMALL

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOLS = tuple(
    {"type": "function", "function": {"name": name, "description": "", "parameters": PARAMETERS}}
    for name in ("weather", "news")
)
EXPECTED = Turn("assistant", "", (ToolCall("weather", {"days": 2, "city": "New Ulm"}),))
PLAIN = Turn("assistant", "Hello.")

FORMS: dict[str, Family] = {
    "react": QWEN_V1,
    "hermes": replace(ANSWER_STYLES[0], tool_form=HERMES_FORMS[0]),
    "xml": replace(STRICT_STYLES[1], tool_form=XML_FORMS[0]),
}


def written(form: str, name: str, arguments: dict[str, Any]) -> str:
    """Return a call as models write it."""
    if form == "react":
        return f"Thought: I look.\nAction: {name}\nAction Input: {json.dumps(arguments)}"
    if form == "hermes":
        return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Subject]:
    folder = tmp_path_factory.mktemp("fast")
    return {is_v1: load_subject("small" if is_v1 else "fast", SMALL, folder) for is_v1 in (True, False)}


def caller(subjects: dict[bool, Subject], form: str) -> Caller:
    checkpoint: Any = SimpleNamespace(
        family=FORMS[form], tokenizer=subjects[form == "react"].tokenizer, name="tiny", end_ids=[1, 2],
        config=SimpleNamespace(max_position_embeddings=4096), generation_config=GenerationConfig(), model_type="qwen2",
    )  # fmt: skip
    return Caller(checkpoint, Prompts(), 64)


@pytest.mark.parametrize("form", FORMS)
def test_calls_of_each_form_have_the_scores_of_the_table(subjects: dict[bool, Subject], form: str) -> None:
    """One right call, one of the wrong function, one answer without a call; one call in vain, one right answer."""
    right = written(form, "weather", {"city": "New Ulm", "days": 2})
    wrong = written(form, "news", {"city": "New Ulm", "days": 2})
    asked = (Turn("user", "?"),)
    cases = [(EXPECTED, right), (EXPECTED, wrong), (EXPECTED, "It rains."), (PLAIN, wrong), (PLAIN, "Hello.")]
    of_form = caller(subjects, form)
    rows = [
        of_form.row(ToolQuestion("a:1", asked, TOOLS, expected), Answer(text, (), (), Usage(1, 7), "stop"))
        for expected, text in cases
    ]
    means = mean_scores([row["scores"] for row in rows])
    assert means["tool_selection"] == pytest.approx(1 / 3)
    assert means["tool_input"] == pytest.approx(2 / 3)  # the wrong function has the right arguments
    assert means["false_positive"] == 1 / 2
    assert [sorted(set(row["scores"]) & {"tool_selection", "false_positive"}) for row in rows] == [
        *[["tool_selection"]] * 3, *[["false_positive"]] * 2,
    ]  # fmt: skip
    assert [row["scores"]["exact_match"] for row in rows][4] == 1


@pytest.mark.parametrize(
    ("given", "selection", "overlap"),
    [
        ([ToolCall("Weather ", '{"city": "New Ulm", "days": 2}')], 1, 1),  # the original compares in small letters
        # Five words, of which four are common.
        ([ToolCall("weather", '{"days": 3, "city": "New Ulm"}')], 1, 2 * 4 / 10),
        ([ToolCall("weather", '{"city": "New"}')], 1, 2 * 1 / (5 + 2)),
        ([ToolCall("weather", "New Ulm, 2 days")], 1, 0),  # no JSON
        ([ToolCall("weather", {}), ToolCall("news", {})], 0, 0),
        ([], 0, 0),
    ],
)
def test_selection_and_overlap_by_hand(given: list[ToolCall], selection: float, overlap: float) -> None:
    scores = tool_scores(EXPECTED, Turn("assistant", "", tuple(given)), str.split)
    assert scores == {"tool_selection": selection, "tool_input": pytest.approx(overlap)}


def test_questions_are_the_answered_messages_of_conversations_with_tools(tmp_path: Path) -> None:
    call = {"role": "assistant", "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    ]}  # fmt: skip
    records = [
        {"messages": [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]},
        {"tools": TOOLS, "messages": [
            {"role": "user", "content": "C"}, call, {"role": "tool", "tool_call_id": "1", "content": "22"},
            {"role": "assistant", "content": "D"}, {"role": "user", "content": "E"},
            {"role": "assistant", "content": "F"},
        ]},
    ]  # fmt: skip
    file = tmp_path / "tools.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    questions = read_tool_questions(file, "auto", None, 0)
    assert [(each.where, len(each.turns), each.turns[-1].content) for each in questions] == [
        (f"{file}:2", 1, "C"), (f"{file}:2 (2)", 5, "E"),
    ]  # fmt: skip
    assert [bool(each.expected.calls) for each in questions] == [True, False]
    assert read_tool_questions(file, "auto", 1, 0)[0] in questions
    file.write_text(json.dumps(records[0]))
    with pytest.raises(DataError, match=r"tools\.jsonl: has no question for which tools are offered\. Give"):
        read_tool_questions(file, "auto", None, 0)
