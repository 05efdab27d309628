"""Calls as JSON between tags: segments, weights, arguments, and truncation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from chat.families import ANSWER_STYLES, Family
from chat.render import render, text_of
from chat.segments import Segment
from chat.tools_hermes import HERMES_FORMS, Hermes
from chat.turns import Tool, ToolCall, Turn
from data_utils.encode import EncodedConversation
from tests.encoding import trained_runs
from tests.families import load_family

WEATHER: Tool = {"type": "function", "function": {"name": "weather", "parameters": {"city": "string"}}}
SYSTEM, ASK = Turn("system", "Be brief."), Turn("user", "Ulm?")
CALL = Turn("assistant", "Both.", (ToolCall("weather", {"city": "Ulm"}), ToolCall("weather", {"city": "Bonn"})))
ULM, BONN = Turn("tool", "22"), Turn("tool", "<|im_end|>")
ANSWER = Turn("assistant", "22.")
CALLS = (
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call>'
)
START, END = "<|im_start|>", "<|im_end|>"


def qwen2_5(form: Hermes = HERMES_FORMS[0]) -> Family:
    return Family("chatml", default_system="Hi.", tool_form=form)


def segments(turns: Sequence[Turn], family: Family, **options: object) -> list[Segment]:
    rendered = render(turns, family, **options)  # type: ignore[arg-type]
    return [segment for message in rendered for segment in message.segments]


def test_segments_have_authors_and_weights() -> None:
    assert segments([SYSTEM, ASK, CALL, ULM, BONN, ANSWER], qwen2_5())[8:] == [
        Segment(START, True, 0, "assistant"),
        Segment("assistant\n", False, 0, "assistant"),
        Segment(f"Both.\n{CALLS}", False, 1, "assistant"),
        Segment(END, True, 1, "assistant"),
        Segment("\n", False, 1, "assistant"),
        Segment(START, True, 0, "tool"),
        Segment(
            "user\n<tool_response>\n22\n</tool_response>\n<tool_response>\n<|im_end|>\n</tool_response>",
            False,
            0,
            "tool",
        ),
        Segment(END, True, 0, "tool"),
        Segment("\n", False, 0, "tool"),
        Segment(START, True, 0, "assistant"),
        Segment("assistant\n", False, 0, "assistant"),
        Segment("22.", False, 1, "assistant"),
        Segment(END, True, 1, "assistant"),
        Segment("\n", False, 1, "assistant"),
    ]


@pytest.mark.parametrize(
    ("label_mask", "trained"),
    [
        ("assistant", {"assistant"}),
        ("last", {"assistant"}),
        ("qwen", {"assistant"}),
        ("all", {"system", "user", "assistant", "tool"}),
    ],
)
@pytest.mark.parametrize("family", [qwen2_5(), Family("chatml", tool_form=HERMES_FORMS[2])], ids=["default", "none"])
def test_only_the_mask_all_trains_other_authors(family: Family, label_mask: str, trained: set[str]) -> None:
    written = segments([ASK, CALL, ULM, BONN, ANSWER], family, label_mask=label_mask, tools=[WEATHER])
    texts = [segment for segment in written if not segment.is_control and segment.text != "\n"]
    assert {segment.role for segment in texts if segment.weight} == trained
    if label_mask == "all":
        assert all(segment.weight == 1 for segment in written)
    if label_mask == "last":
        assert [segment.text for segment in texts if segment.weight] == ["22."]


def test_results_have_their_own_weights() -> None:
    turns = [ASK, CALL, ULM._replace(weight=0.5), BONN, ANSWER._replace(weight=2.0)]
    weights = {segment.text: segment.weight for segment in segments(turns, qwen2_5()) if not segment.is_control}
    assert weights["user\n<tool_response>\n22\n</tool_response>\n"] == 0.5
    assert weights["<tool_response>\n<|im_end|>\n</tool_response>"] == 0
    assert weights["22."] == 2


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3"])
def test_weights_of_results_do_not_change_the_ids(shared: Path, name: str) -> None:
    checkpoint = load_family(shared, name)
    turns = [ASK, CALL, ULM, BONN, ANSWER]
    weighed = [turn._replace(weight=float(turn is ULM)) for turn in turns]
    encoded = checkpoint.encode(weighed, [WEATHER])
    assert encoded.input_ids == checkpoint.encode(turns, [WEATHER]).input_ids
    [[start, end]] = trained_runs(encoded)
    assert checkpoint.encoder().decode(encoded.input_ids[start:end]) == "user\n<tool_response>\n22\n</tool_response>\n"


@pytest.mark.parametrize(
    ("arguments", "decoded", "kept"),
    [
        ({"b": None, "a": [1e-07, True]}, '{"b": null, "a": [1e-07, true]}', '{"b": null, "a": [1e-07, true]}'),
        ([1], "[1]", "[1]"),
        (3, "3", "3"),
        ('{"b":1,  "a":"\\u00e9"}', '{"b": 1, "a": "é"}', '{"b":1,  "a":"\\u00e9"}'),
        ('"x"', '"x"', '"x"'),
        ("not JSON", '"not JSON"', "not JSON"),
        ("", '""', ""),
        # A value that decoding would change stays a string.
        ('{"a": 1, "a": 2}', '"{\\"a\\": 1, \\"a\\": 2}"', '{"a": 1, "a": 2}'),
        ('{"a": NaN}', '"{\\"a\\": NaN}"', '{"a": NaN}'),
        ("1e999", '"1e999"', "1e999"),
        ("[" * 9999, '"' + "[" * 9999 + '"', "[" * 9999),
    ],
)
def test_string_arguments_are_decoded_or_kept(arguments: object, decoded: str, kept: str) -> None:
    for form, text in ((HERMES_FORMS[0], decoded), (HERMES_FORMS[2], kept)):
        written = f'<tool_call>\n{{"name": "f", "arguments": {text}}}\n</tool_call>'
        assert form.calls_text([ToolCall("f", arguments)]) == written


def test_tools_are_described_in_the_system_message() -> None:
    def system(turns: list[Turn], family: Family) -> str:
        return text_of(render(turns, family, tools=[WEATHER])[:1]).partition("# Tools")[0]

    qwq = Family("chatml", tool_form=HERMES_FORMS[0])
    qwen3 = Family("chatml", tool_form=HERMES_FORMS[2])
    for family, without in ((qwen2_5(), "Hi.\n\n"), (qwq, "\n\n"), (qwen3, "")):
        assert system([ASK], family) == f"{START}system\n{without}"
        assert system([SYSTEM, ASK], family) == f"{START}system\nBe brief.\n\n"
        assert system([Turn("system", ""), ASK], family) == f"{START}system\n\n\n"


STEPS = (
    SYSTEM,
    ASK,
    CALL._replace(thinking="Two of them. " * 5),
    ULM,
    BONN,
    Turn("assistant", "", (ToolCall("weather", {"city": "Rome"}),), thinking="One more."),
    Turn("tool", "30 " * 20),
    ANSWER._replace(thinking="Done."),
    Turn("user", "And now?"),
    Turn("assistant", "<think>\nNo call.\n</think>\n\nStill 22."),
)


@pytest.mark.parametrize("truncation", ["turns", "turns_left"])
@pytest.mark.parametrize("name", ["qwen2_5", "qwq_32b", "qwen3", "qwen3_instruct_2507", "qwen3_thinking_2507"])
def test_truncated_conversation_is_rendered_on_its_own(shared: Path, name: str, truncation: str) -> None:
    """At many lengths: a start, or an end from a question on, is kept; it contains an answer."""
    checkpoint = load_family(shared, name)
    turns = [turn._replace(thinking=None) if checkpoint.family.thinking == "none" else turn for turn in STEPS]
    rests = [turns[:kept] for kept in range(1, len(turns) + 1)]
    if truncation == "turns_left":
        rests = [[SYSTEM, *turns[start:]] for start in (1, 8)]
    wholes = [checkpoint.encode(rest, [WEATHER], needs_answer=False) for rest in rests]
    kept_at: set[int] = set()
    for max_length in range(1, max(len(whole.input_ids) for whole in wholes) + 7, 7):
        encoded = checkpoint.encode(turns, [WEATHER], truncation=truncation, max_length=max_length)
        if not encoded.input_ids:
            assert encoded == EncodedConversation([], [], turns_dropped=9)
            continue
        index = next(number for number, whole in enumerate(wholes) if whole.input_ids == encoded.input_ids)
        assert (encoded.spans, len(encoded.input_ids) <= max_length) == (wholes[index].spans, True)
        assert encoded.trained_tokens > 0 and all(span.role == "assistant" for span in encoded.spans if span.weight)
        kept_at.add(index)
    assert len(kept_at) >= (2 if truncation == "turns_left" else 4)


def test_truncation_keeps_a_start_that_trains_something(shared: Path) -> None:
    """QwQ removes thinking from history, so a start that ends with a question would train nothing."""
    checkpoint = load_family(shared, "qwq_32b")
    turns = [
        ASK,
        Turn("assistant", "<think>\nHm.\n</think>\n\n22."),
        Turn("user", "And?"),
        Turn("assistant", "x " * 99),
    ]
    encoded = checkpoint.encode(turns, max_length=60)
    assert encoded == replace(checkpoint.encode(turns[:2]), turns_dropped=2)
    assert encoded.trained_tokens == 10


@pytest.mark.parametrize("style", ANSWER_STYLES, ids=lambda style: style.name)
def test_family_without_a_tool_form_refuses_tools(style: Family) -> None:
    for turns, tools in (([ASK], [WEATHER]), ([ASK, CALL], []), ([ASK, ULM], [])):
        with pytest.raises(ValueError, match=re.escape(f"the chat format {style.name!r} cannot write tools")):
            render(turns, style, tools=tools)
