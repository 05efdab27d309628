"""Qwen1.5 to Qwen3: our rendering against the official chat templates, run by transformers on the real vocabulary.

The recorded rows say for each conversation the text, the characters that the model has to generate (``spans``) and the
ids of the whole text tokenised at once. Ours must give the same, but for two differences that are wanted:

- An answer is cut off its prompt, because at inference the model continues the prompt's ids. Where it starts with a
  newline the recorded ids melt it into the prompt's last newline, a token that no prompt ends in. ``MELTING`` names
  those rows.
- ``<|im_end|>`` in a message stays text (the rows ``control_text``).
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from chat.detect import as_template_reads, family_of
from chat.families import ANSWER_STYLES, Family
from chat.render import encode_prompt, render, render_prompt, text_of
from chat.tools_hermes import HERMES_FORMS
from chat.turns import Turn
from errors import ConfigError, DataError
from tests.encoding import trained_runs
from tests.families import (
    STYLES,
    Checkpoint,
    Row,
    closed,
    left_out,
    load_family,
    trained_spans,
    turns_of,
)

IM_START, IM_END = 151644, 151645
SPECIALS = {151643, *range(IM_START, 151657)}

TOOL_ROWS = {"tool_call_and_answer", "tool_call_final", "tool_multi_step_thinking", "tool_multi_step_then_user"}
OLD = ("qwen1_5", "qwen1_5_launch", "qwen1_5_base", "qwen2")

# Rows whose recorded ids hold a token across the end of a prompt: an answer that starts with a newline, and in
# Thinking-2507 the empty thought, "\\n</think>" behind the prompt's "<think>\\n". QwQ strips the newlines of answers.
MELTING: dict[str, set[str]] = {name: {"whitespace_answers"} for name in STYLES} | {
    "qwq_32b": set(),
    "qwq_32b_launch": set(),
    "qwen3_thinking_2507": {
        "single",
        "system_single",
        "multi",
        "whitespace_answers",
        "control_text",
        "assistant_first",
        "two_assistants",
        "empty_answer",
        "tool_call_and_answer",
        "tool_call_final",
    },
}


@pytest.fixture(params=STYLES)
def checkpoint(request: pytest.FixtureRequest, shared: Path) -> Checkpoint:
    return load_family(shared, request.param)


def compared(checkpoint: Checkpoint) -> list[Row]:
    return [row for row in checkpoint.rows if not left_out(row, checkpoint)]


def read_turns(row: Row, family: Family) -> list[Turn]:
    return as_template_reads(turns_of(row), family)


def _answer_starts(row: Row, family: Family) -> list[int]:
    """Where each answer starts behind its prompt, in characters, from the recorded header ends."""
    starts = []
    for turn in row["turns"]:
        start = turn["header_end"]
        starts.append(start + len(family.prompt_suffix) * row["text"].startswith(family.prompt_suffix, start))
    return starts


def test_family_is_read_off_the_template(checkpoint: Checkpoint) -> None:
    family = checkpoint.family
    assert family.name == STYLES[checkpoint.name]
    assert family.default_system == checkpoint.facts["default_system"]
    assert family.knows_thinking
    form = {"qwen2_5_launch": 1}.get(checkpoint.name, 2 if checkpoint.name.startswith("qwen3") else 0)
    assert family.tool_form == (None if checkpoint.name in OLD else HERMES_FORMS[form])


def test_all_rows_but_those_that_are_refused_are_compared(checkpoint: Checkpoint) -> None:
    names = {row["name"] for row in checkpoint.rows}
    refused = TOOL_ROWS & names if checkpoint.name in OLD else set()
    assert {row["name"] for row in compared(checkpoint)} == names - refused
    assert len(names) == (0 if checkpoint.name == "qwen2_5_launch" else len(checkpoint.rows))


def test_text_and_trained_characters_are_the_templates_own(checkpoint: Checkpoint) -> None:
    for row in compared(checkpoint):
        rendered = render(read_turns(row, checkpoint.family), checkpoint.family, tools=row["tools"] or ())
        assert text_of(rendered) == row["text"], row["name"]
        assert trained_spans(rendered) == row["spans"], row["name"]
        assert closed(checkpoint.template(row["messages"], row["tools"] or ()), checkpoint.family) == row["text"], row[
            "name"
        ]


def test_ids_and_trained_tokens(checkpoint: Checkpoint) -> None:
    differing = set()
    for row in compared(checkpoint):
        encoded = checkpoint.encode(read_turns(row, checkpoint.family), row["tools"] or ())
        runs = trained_runs(encoded)
        trained_texts = [checkpoint.tokenizer.decode(encoded.input_ids[start:end]) for start, end in runs]
        assert checkpoint.tokenizer.decode(encoded.input_ids) == row["text"], row["name"]
        assert trained_texts == [row["text"][start:end] for start, end in row["spans"]], row["name"]
        if encoded.input_ids != row["ids"]:
            differing.add(row["name"])
        else:
            assert runs == row["token_spans"], row["name"]
    assert differing == ({"control_text"} | MELTING[checkpoint.name] if checkpoint.rows else set())


def test_ids_are_those_of_the_text_cut_where_answers_start(checkpoint: Checkpoint) -> None:
    for row in compared(checkpoint):
        if row["name"] == "control_text":
            continue
        cuts = [0, *_answer_starts(row, checkpoint.family), len(row["text"])]
        pieces = [row["text"][start:end] for start, end in pairwise(cuts)]
        expected = [
            id_ for piece in pieces for id_ in checkpoint.tokenizer(piece, add_special_tokens=False)["input_ids"]
        ]
        encoded = checkpoint.encode(read_turns(row, checkpoint.family), row["tools"] or ())
        assert encoded.input_ids == expected, row["name"]


def test_control_text_in_messages_gives_no_control_ids(checkpoint: Checkpoint) -> None:
    for row in compared(checkpoint):
        turns = read_turns(row, checkpoint.family)
        placed = len(render(turns, checkpoint.family, tools=row["tools"] or ()))
        ids = checkpoint.encode(turns, row["tools"] or ()).input_ids
        assert ids.count(IM_START) == ids.count(IM_END) == placed, row["name"]
        assert sum(id_ in SPECIALS for id_ in ids) == 2 * placed, row["name"]


def test_prompts_are_the_templates_own_and_start_the_training_ids(checkpoint: Checkpoint) -> None:
    for row in compared(checkpoint):
        turns, tools = read_turns(row, checkpoint.family), row["tools"] or ()
        encoded = checkpoint.encode(turns, tools)
        starts = [start for start, _ in trained_runs(encoded)]
        prompts = []
        for index, turn in enumerate(turns):
            if turn.role != "assistant" or index == 0:
                continue
            rendered = render_prompt(turns[:index], checkpoint.family, tools=tools)
            template = checkpoint.template(row["messages"][:index], tools, prompt=True)
            assert text_of(rendered) == template, (row["name"], index)
            prompt = encode_prompt(rendered, checkpoint.tokenizer)
            if encoded.input_ids[: len(prompt)] == prompt:
                prompts.append(len(prompt))
        assert set(starts) <= set(prompts), row["name"]
        assert len(starts) == len(row["spans"]), row["name"]


THOUGHT = Turn("assistant", "2", thinking="add")
SAID = Turn("assistant", "<think>\nadd\n</think>\n\n2")


def test_thinking_is_trained_where_it_has_a_place_and_refused_elsewhere(checkpoint: Checkpoint) -> None:
    ask = Turn("user", "1+1?")
    kind = checkpoint.family.thinking
    start = f"<|im_start|>assistant\n{checkpoint.family.prompt_suffix}"
    if kind == "none":
        with pytest.raises(
            DataError, match=r"^here: turn 2 has a field with thinking, which the chat format 'chatml.*' does not"
        ):
            checkpoint.encode([ask, THOUGHT])
    else:
        # In a field or in the text: the same.
        assert checkpoint.encode([ask, THOUGHT]) == checkpoint.encode([ask, SAID])
    encoded = checkpoint.encode([ask, SAID])
    decode = checkpoint.encoder().decode
    text = decode(encoded.input_ids)
    trained = [decode(encoded.input_ids[first:end]) for first, end in trained_runs(encoded)]
    if kind == "stripped":
        assert text.endswith("<|im_start|>assistant\n2<|im_end|>\n") and trained == []
    else:
        whole = "<|im_start|>assistant\n<think>\nadd\n</think>\n\n2<|im_end|>\n"
        assert text.endswith(whole) and trained == [whole.removeprefix(start)]


@pytest.mark.parametrize(
    ("changed", "to"), [("# Tools", "## Tools"), ("{%- if tools %}", "{%- if tools %}{{- raise_exception('no') }}")]
)
def test_tools_that_a_template_writes_otherwise_are_refused(shared: Path, changed: str, to: str) -> None:
    checkpoint = load_family(shared, "qwen3")
    checkpoint.tokenizer.chat_template = str(checkpoint.tokenizer.chat_template).replace(changed, to, 1)
    family = family_of(checkpoint.tokenizer)
    assert (family.name, family.tool_form, family.knows_thinking) == ("chatml-hybrid", None, True)
    with pytest.raises(DataError, match=r"^here: the chat format 'chatml-hybrid' cannot write tools and calls"):
        replace(checkpoint, family=family).encode([Turn("user", "Hi"), Turn("assistant", "Hi")], [{"name": "f"}])


def test_thinking_that_a_template_writes_otherwise_is_refused(shared: Path) -> None:
    checkpoint = load_family(shared, "qwen3")
    # As templates for training do: no answer loses its thinking.
    checkpoint.tokenizer.chat_template = (
        str(checkpoint.tokenizer.chat_template)
        .replace("loop.last or (not loop.last and reasoning_content)", "loop.last or reasoning_content")
        .replace("loop.index0 > ns.last_query_index", "loop.index0 > ns.last_query_index or reasoning_content")
    )
    family = family_of(checkpoint.tokenizer)
    assert (family.name, family.knows_thinking, family.tool_form) == ("chatml-hybrid", False, HERMES_FORMS[2])
    changed = replace(checkpoint, family=family)
    for answer in (SAID, THOUGHT, Turn("assistant", "add</think>2")):
        with pytest.raises(
            DataError, match=r"^here: turn 2 contains thinking, which the checkpoint's chat template writes"
        ):
            changed.encode([Turn("user", "1+1?"), answer])
    assert changed.encode([Turn("user", "what is <think>?"), Turn("assistant", "a tag")]).input_ids


def test_a_template_that_is_no_known_one_is_refused() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_WORD_LEVEL))
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    with pytest.raises(ConfigError, match="does not write plain conversations as any known Qwen template"):
        family_of(tokenizer)


def test_every_style_is_met_by_a_family() -> None:
    assert {style.name for style in ANSWER_STYLES} == set(STYLES.values())


_WORD_LEVEL = json.dumps(
    {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
)
