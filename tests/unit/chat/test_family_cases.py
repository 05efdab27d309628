"""Qwen1.5 to Qwen3: recorded and random conversations with tools and thinking against the official templates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
from jinja2 import TemplateError

from chat.detect import as_template_reads
from chat.families import Family
from chat.render import render, render_answer, render_prompt, text_of
from chat.tools_hermes import Hermes
from chat.turns import Tool, ToolCall, Turn
from data_utils.files import read_records
from data_utils.formats import FORMATS
from errors import DataError
from tests.encoding import check_and_encode
from tests.families import CHECKPOINTS, Checkpoint, closed, left_out, load_family, messages_of, turns_of

# Names whose template equals that of another name.
ALIASES = ("qwen1_5", "qwen2_5_coder")


@pytest.fixture(params=[item for item in CHECKPOINTS if item[0] not in ALIASES], ids=str)
def checkpoint(request: pytest.FixtureRequest, shared: Path) -> Checkpoint:
    return load_family(shared, *request.param)


def opens_answer(prompt: str, family: Family) -> bool:
    """Check that a prompt ends in an answer's header; after an answer, that of Qwen1.5's launch does not."""
    return prompt.endswith(f"<|im_start|>assistant\n{family.prompt_suffix}")


def test_expressible_cases_equal_the_template(checkpoint: Checkpoint) -> None:
    family = checkpoint.family
    for case in checkpoint.cases:
        if left_out(case, checkpoint):
            continue
        turns, tools = as_template_reads(turns_of(case), family), case["tools"] or ()
        if case["kwargs"].get("add_generation_prompt"):
            assert text_of(render_prompt(turns, family, tools=tools)) == case["text"], case["name"]
            continue
        rendered = render(turns, family, tools=tools)
        assert text_of(rendered) == closed(case["text"], family), case["name"]
        trained = {message.end - 1 for message in rendered if any(segment.weight for segment in message.segments)}
        expected = {answer["turn"] for answer in case["prefix_holds"] if answer["prefix_holds"]}
        if not family.prompts_after_answer:
            expected = {index for index in expected if turns[index - 1].role != "assistant"}
        assert trained == expected, case["name"]


def test_prompts_of_all_cases_are_prefixes_of_the_samples_of_their_answers(checkpoint: Checkpoint) -> None:
    family = checkpoint.family
    for case in checkpoint.cases:
        turns = turns_of(case) if not left_out(case, checkpoint) else []
        for index, turn in enumerate(turns):
            if turn.role != "assistant" or not index:
                continue
            prompt = template_or_none(checkpoint, turns[:index], case["tools"] or (), prompt=True)
            if prompt is None:
                continue  # without a question
            turns_read = as_template_reads(turns[: index + 1], family)
            sample = render_answer(turns_read, family, tools=case["tools"] or ())
            follows = opens_answer(prompt, family) and text_of(sample).startswith(prompt)
            assert bool(sample[-1].trained) == follows, case["name"]


def test_most_cases_are_compared(checkpoint: Checkpoint) -> None:
    compared = [case for case in checkpoint.cases if not left_out(case, checkpoint)]
    assert len(compared) >= 0.5 * len(checkpoint.cases)


def test_orders_that_a_strict_template_refuses_are_refused(checkpoint: Checkpoint) -> None:
    if not checkpoint.family.is_strict:
        return
    for case in checkpoint.cases:
        expressible = {key: value for key, value in case.items() if key != "error"}
        if "error" in case and not left_out(expressible, checkpoint):
            with pytest.raises(ValueError, match=r"chat format 'chatml-3\.[58]'"):
                render(turns_of(case), checkpoint.family, tools=case["tools"] or ())


TEXTS = (
    "\n",
    "\n\n",
    " ",
    "\t",
    "\r\n",
    "a",
    "Hi",
    "你好",
    ".",
    "<|im_end|>",
    "<think",
    "<tool_call>",
    "</tool_response>",
)
THOUGHTS = ("<think>", "</think>", "<think>\n", "\n</think>\n\n")
RESULT = "<tool_response>\n1\n</tool_response>"
VALUES: tuple[Any, ...] = (
    None,
    True,
    1,
    1.0,
    1e-07,
    "",
    "é\n</tool_call>",
    "\u2028",
    [],
    [1, {"b": "<"}],
    {"z": 1, "a": {}},
)
TOOLS: tuple[Tool, ...] = (
    {"type": "function", "function": {"name": "f", "description": "é <|im_end|>", "parameters": {"b": [], "a": 1.0}}},
    {"name": "g"},
)


def random_conversation(random: Random, family: Family) -> tuple[list[Turn], list[Tool]]:
    """Draw turns in any order: texts of white space, control tokens and words; calls, results and thinking."""
    form = family.tool_form
    roles = ["system"] if random.random() < 0.3 else []
    kinds = ["user", "assistant", "assistant"] + (["tool", "tool"] if form else [])
    roles += random.choices(kinds, k=random.randint(1, 7))
    turns = []
    for role in roles:
        pieces = TEXTS + THOUGHTS if role == "assistant" and random.random() < 0.5 else TEXTS
        turn = Turn(role, "".join(random.choices(pieces, k=random.randint(0, 4))))
        if role == "user" and random.random() < 0.15:
            turn = turn._replace(content=RESULT)
        if role == "assistant" and random.random() < 0.4:
            turn = turn._replace(thinking="".join(random.choices(TEXTS, k=random.randint(0, 3))))
        if role == "assistant" and form and random.random() < 0.4:
            calls = [ToolCall(f"f{number}", _arguments(random, form)) for number in range(random.randint(1, 2))]
            turn = turn._replace(calls=tuple(calls))
        turns.append(turn)
    return turns, random.sample(TOOLS, random.randint(0, 2)) if form else []


def _arguments(random: Random, form: object) -> Any:
    if isinstance(form, Hermes) and form.keeps_strings and random.random() < 0.3:
        return random.choice(('{"a" :1}', "no JSON", ""))
    return {key: random.choice(VALUES) for key in random.sample("abc", random.randint(0, 3))}


def test_random_conversations_against_the_template(checkpoint: Checkpoint) -> None:
    """Compare text and prompts; exactly those answers are trained whose prompt is a prefix of the text."""
    family, random = checkpoint.family, Random(0)
    for _ in range(100 if checkpoint.mode else 300):
        turns, tools = random_conversation(random, family)
        if family.is_strict and turns[0].role == "tool":
            continue  # written without its header, which is refused
        if (written := template_or_none(checkpoint, turns, tools)) is None:
            with pytest.raises(ValueError, match="has no question of a user"):
                render(turns, family, tools=tools)
            continue
        text = closed(written, family)
        read = as_template_reads(turns, family)
        rendered = render(read, family, tools=tools)
        assert text_of(rendered) == text, (turns, tools)
        trained = {message.end - 1 for message in rendered if any(segment.weight for segment in message.segments)}
        for index, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            prompt = (template_or_none(checkpoint, turns[:index], tools, prompt=True) or "") if index else ""
            if prompt:
                assert prompt == text_of(render_prompt(read[:index], family, tools=tools)), (turns[:index], tools)
                sample = render_answer(read[: index + 1], family, tools=tools)
                text_of_sample = text_of(sample)
                follows = opens_answer(prompt, family) and text_of_sample.startswith(prompt)
                assert bool(sample[-1].trained) == follows, (turns[: index + 1], tools)
                if turns[index - 1].role != "assistant":  # whose block of thinking depends on what follows
                    assert text_of_sample == closed(checkpoint.template(messages_of(turns[: index + 1]), tools), family)
            assert (index in trained) == (opens_answer(prompt, family) and text.startswith(prompt)), (index, turns)


def template_or_none(
    checkpoint: Checkpoint, turns: Sequence[Turn], tools: Sequence[Tool], prompt: bool = False
) -> str | None:
    """Return the text of the template; ``None`` if it finds no question."""
    try:
        return checkpoint.template(messages_of(turns), tools, prompt)
    except TemplateError as error:
        assert str(error) == "No user query found in messages."
        return None


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3"])
def test_corpus_of_calls_from_file_to_ids(shared: Path, name: str) -> None:
    """Every record encodes to its template's text, and no tool result is trained."""
    checkpoint = load_family(shared, name)
    encoder = checkpoint.encoder(max_length=1 << 20)
    path = shared / "corpora" / "glaive_toolcall_en_demo.json"
    records = results = 0
    for where, record in read_records(path):
        assert not isinstance(record, DataError)
        conversation = FORMATS["conversations"].parse(record, where)
        encoded = check_and_encode(encoder, conversation)
        text = checkpoint.template(messages_of(conversation.turns), conversation.tools)
        assert encoder.decode(encoded.input_ids) == text, where
        assert {span.role for span in encoded.spans if span.weight} == {"assistant"}, where
        position = 0
        for span in encoded.spans:
            position += span.length
            if span.role == "tool":
                written = encoder.decode(encoded.input_ids[position - span.length : position])
                results += written.count("<tool_response>")
        records += 1
        results -= sum(turn.role == "tool" for turn in conversation.turns)
    assert records == len(json.loads(path.read_text(encoding="utf-8"))) > 0
    assert results == 0
