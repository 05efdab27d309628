"""Special tokens in any field of a record stay text."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from chat.families import Family
from data_utils.encode import EncodedConversation
from data_utils.formats import recognise
from data_utils.sources import fill_turns
from tests.chats import END, LATER_FAMILIES, START, Subject

MARK, HALVES = "QX17", ("first half", "other half")


def _tool(**fields: Any) -> dict[str, Any]:
    return {"name": "f", "description": "d", "parameters": {}, **fields}


def _with_call(call: Any, result: str = "r") -> list[dict[str, str]]:
    pairs = [("human", "u"), ("function_call", json.dumps(call)), ("observation", result), ("gpt", "a")]
    return [{"from": author, "value": text} for author, text in pairs]


def _messages_with_call(call: Any, result: Any = "r", **fields: Any) -> list[dict[str, Any]]:
    called = {"role": "assistant", "content": "t", "tool_calls": [{"function": call}], **fields}
    answer = {"role": "assistant", "content": "a"}
    return [{"role": "user", "content": "u"}, called, {"role": "tool", "content": result}, answer]


def _messages(user: Any = "u", answer: str = "a", **fields: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": answer, **fields}]


FIELDS: dict[str, dict[str, Any]] = {
    "conversations user": {"conversations": [{"from": "user", "value": MARK}, {"from": "assistant", "value": "a"}]},
    "conversations answer": {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": MARK}]},
    "conversations system": {"conversations": [{"from": "system", "value": MARK}, {"from": "gpt", "value": "a"}]},
    "conversations system field": {"system": MARK, "conversations": [{"from": "gpt", "value": "a"}]},
    "messages user": {"messages": _messages(MARK)},
    "messages answer": {"messages": _messages("u", MARK)},
    "messages part": {"messages": _messages([{"type": "text", "text": "x"}, {"type": "text", "text": MARK}])},
    "messages parts": {"messages": _messages([{"type": "text", "text": half} for half in HALVES])},
    "messages system": {"messages": [{"role": "developer", "content": MARK}, *_messages()]},
    "messages system field": {"messages": _messages(), "system": MARK},
    **{
        f"alpaca {name}": {"instruction": "i", "input": "i", "output": "o", name: MARK}
        for name in ("instruction", "input", "output", "system")
    },
    "alpaca history question": {"instruction": "i", "output": "o", "history": [[MARK, "a"]]},
    "alpaca history answer": {"instruction": "i", "output": "o", "history": [["q", MARK]]},
    **{f"pairs {name}": {"question": "q", "answer": "a", name: MARK} for name in ("question", "answer", "system")},
    "pairs history": {"prompt": "q", "response": "a", "history": [[MARK, MARK]]},
    "fill": {"prompt": "{{name}}", "response": "a {{name}}{{name}}"},
    **{
        f"tools {name}": {"messages": _messages(), "tools": [_tool(**{name: MARK})]}
        for name in ("name", "description", "parameters", "name_for_human", "name_for_model", "description_for_model")
    },
    "tools parameter name": {"messages": _messages(), "tools": [_tool(parameters={"properties": {MARK: {"a": "b"}}})]},
    "tools as text": {
        "conversations": _with_call({"name": "f"}),
        "tools": json.dumps([_tool(description=MARK)]),
    },
    "tools of alpaca": {
        "instruction": "i",
        "output": "o",
        "tools": [{"type": "function", "function": _tool(name=MARK)}],
    },
    "tools and question": {"messages": _messages(MARK), "tools": [_tool()]},
    "conversations call name": {"conversations": _with_call({"name": MARK, "arguments": {}})},
    "conversations arguments": {"conversations": _with_call({"name": "f", "arguments": {"a": [MARK], MARK: 1}})},
    "conversations arguments as text": {
        "conversations": _with_call({"name": "f", "arguments": json.dumps({MARK: MARK})})
    },
    "conversations result": {"conversations": _with_call({"name": "f"}, MARK)},
    "messages call name": {"messages": _messages_with_call({"name": MARK, "arguments": "{}"})},
    "messages arguments": {"messages": _messages_with_call({"name": "f", "arguments": {MARK: MARK}})},
    "messages arguments as text": {
        "messages": _messages_with_call({"name": "f", "arguments": json.dumps({MARK: MARK})})
    },
    "messages result": {"messages": _messages_with_call({"name": "f"}, MARK)},
    "messages result part": {"messages": _messages_with_call({"name": "f"}, [{"type": "text", "text": MARK}])},
    "messages beside calls": {"messages": _messages_with_call({"name": "f"}, content=MARK)},
}
THOUGHT = {"messages": _messages(reasoning_content=MARK)}
THINKING_FAMILIES = [family for family in LATER_FAMILIES if family.has_thinking and family.thinking != "stripped"]


@pytest.mark.parametrize("name", FIELDS)
def test_special_tokens_in_any_field_stay_text(subject: Subject, name: str) -> None:
    _check_special_tokens(subject, subject.families[0], json.dumps(FIELDS[name]))


@pytest.mark.parametrize("subject", ["fast"], indirect=True)
@pytest.mark.parametrize("family", THINKING_FAMILIES, ids=lambda family: f"{family.name} {family.tool_form}")
def test_special_tokens_in_thinking_stay_text(subject: Subject, family: Family) -> None:
    _check_special_tokens(subject, family, json.dumps(THOUGHT))


def _check_special_tokens(subject: Subject, family: Family, record: str) -> None:
    """Special tokens in the record give the same ids of special tokens as a plain word in their place."""
    specials = set(subject.tokenizer.convert_tokens_to_ids(list(subject.specials)))
    plain = _encoded(subject, family, record, MARK)
    text = subject.decode(plain.input_ids)
    placed = [id_ for id_ in plain.input_ids if id_ in specials]
    assert MARK in text and placed == subject.tokenizer.convert_tokens_to_ids([START, END.strip()]) * (len(placed) // 2)
    for special in subject.specials:
        encoded = _encoded(subject, family, record, special)
        assert [id_ for id_ in encoded.input_ids if id_ in specials] == placed, special
        assert subject.decode(encoded.input_ids) == text.replace(MARK, special)
        assert [span[1:] for span in encoded.spans] == [span[1:] for span in plain.spans]


def _encoded(subject: Subject, family: Family, record: str, text: str) -> EncodedConversation:
    """Encode the record with a text in place of ``MARK``, in its fields or by ``--fill``."""
    for mark, part in ((MARK, text), (HALVES[0], text[:4]), (HALVES[1], text[4:])):
        record = record.replace(mark, part)
    value = json.loads(record)
    parsed = recognise(value, "here").parse(value, "here")
    turns, _ = fill_turns(parsed.turns, {"name": text})
    return subject.encoder(family).encode_conversation(replace(parsed, turns=turns))
