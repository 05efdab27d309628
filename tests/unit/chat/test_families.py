"""Qwen1.5 to Qwen3: rendering compared with the official chat templates, run by transformers on the real vocabulary.

A recorded row has the text of a conversation, the characters that the model has to generate (``spans``) and the ids of
the whole text tokenised at once. Rendering must give the same, with two intended differences:

- An answer is tokenised apart from its prompt, because at inference the model continues the prompt's ids. If it starts
  with a newline, the recorded ids merge it with the prompt's last newline to a token that no prompt ends in.
- ``<|im_end|>`` in a message stays text.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from chat.detect import as_template_reads, family_of
from chat.families import ANSWER_STYLES, EMPTY_THOUGHT, STRICT_STYLES, Family
from chat.render import encode_prompt, render, render_prompt, text_of
from chat.tools_hermes import HERMES_FORMS
from chat.tools_xml import XML_FORMS
from chat.turns import Turn
from errors import DataError
from tests.encoding import trained_runs
from tests.families import (
    CHECKPOINTS,
    STRICT,
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

OLD = ("qwen1_5", "qwen1_5_launch", "qwen1_5_base", "qwen2")


@pytest.fixture(params=CHECKPOINTS, ids=str)
def checkpoint(request: pytest.FixtureRequest, shared: Path) -> Checkpoint:
    return load_family(shared, *request.param)


def compared(checkpoint: Checkpoint) -> list[Row]:
    return [row for row in checkpoint.rows if not left_out(row, checkpoint)]


def encoded(checkpoint: Checkpoint) -> list[Row]:
    """Return the rows that encode to their text: thinking in the text of an answer is moved to its field."""
    reads_text = checkpoint.family.has_thinking_in_text
    return [row for row in compared(checkpoint) if reads_text or "</think>" not in str(row["messages"])]


def read_turns(row: Row, family: Family) -> list[Turn]:
    return as_template_reads(turns_of(row), family)


def _answer_starts(row: Row, family: Family) -> list[int]:
    """Return the start of each answer after its prompt, in characters, from the recorded header ends."""
    starts = []
    for turn in row["turns"]:
        start = turn["header_end"]
        starts.append(start + len(family.prompt_suffix) * row["text"].startswith(family.prompt_suffix, start))
    return starts


def has_control_text(row: Row, checkpoint: Checkpoint) -> bool:
    """Check that a message contains the text of a special token."""
    specials = [token.content for token in checkpoint.tokenizer.added_tokens_decoder.values() if token.special]
    return any(token in (message.get("content") or "") for message in row["messages"] for token in specials)


def has_token_across_answer_start(row: Row, checkpoint: Checkpoint) -> bool:
    """Check that a token of the text, tokenised at once, crosses the start of an answer."""
    at_once = checkpoint.tokenizer(row["text"], add_special_tokens=False, return_offsets_mapping=True)
    assert at_once["input_ids"] == row["ids"], row["name"]
    starts = _answer_starts(row, checkpoint.family)
    return any(begin < start < end for begin, end in at_once["offset_mapping"] for start in starts)


def test_family_is_detected_from_the_template(checkpoint: Checkpoint) -> None:
    family = checkpoint.family
    assert family.name == (STYLES | STRICT)[checkpoint.name]
    assert family.knows_thinking
    if family.is_strict:
        sentence = checkpoint.facts.get("reasoning_effort", {}).get(checkpoint.mode.get("reasoning_effort"))
        default = checkpoint.facts["default_system"] if sentence is None or "default" in sentence else sentence
        is_silent = checkpoint.mode.get("enable_thinking") is False or default == "no sentence"
        assert (family.default_system, family.instructions) == (None, "" if is_silent else default or "")
        assert family.tool_form == XML_FORMS[0 if checkpoint.name.startswith("qwen3_5") else 1]
        return
    assert family.default_system == checkpoint.facts["default_system"]
    form = {"qwen2_5_launch": 1}.get(checkpoint.name, 2 if checkpoint.name.startswith("qwen3") else 0)
    assert family.tool_form == (None if checkpoint.name in OLD else HERMES_FORMS[form])


def test_only_refused_rows_are_not_compared(checkpoint: Checkpoint) -> None:
    for row in checkpoint.rows:
        uses_tools = row["tools"] or any(m["role"] == "tool" or m.get("tool_calls") for m in row["messages"])
        assert bool(left_out(row, checkpoint)) == bool(uses_tools and checkpoint.name in OLD), row["name"]
    assert bool(compared(checkpoint)) == bool(checkpoint.rows)


def test_text_and_trained_characters_equal_the_template(checkpoint: Checkpoint) -> None:
    for row in compared(checkpoint):
        rendered = render(read_turns(row, checkpoint.family), checkpoint.family, tools=row["tools"] or ())
        assert text_of(rendered) == row["text"], row["name"]
        assert trained_spans(rendered) == row["spans"], row["name"]
        assert closed(checkpoint.template(row["messages"], row["tools"] or ()), checkpoint.family) == row["text"], row[
            "name"
        ]


def test_ids_and_trained_tokens(checkpoint: Checkpoint) -> None:
    for row in encoded(checkpoint):
        sample = checkpoint.encode(read_turns(row, checkpoint.family), row["tools"] or ())
        runs = trained_runs(sample)
        trained_texts = [checkpoint.tokenizer.decode(sample.input_ids[start:end]) for start, end in runs]
        assert checkpoint.tokenizer.decode(sample.input_ids) == row["text"], row["name"]
        assert trained_texts == [row["text"][start:end] for start, end in row["spans"]], row["name"]
        if "ids" not in row:
            continue  # its vocabulary is not here, or its prompts are of another mode
        differs = has_control_text(row, checkpoint) or has_token_across_answer_start(row, checkpoint)
        assert (sample.input_ids != row["ids"]) == differs, row["name"]
        assert differs or runs == row["token_spans"], row["name"]


def test_ids_are_those_of_the_text_split_where_answers_start(checkpoint: Checkpoint) -> None:
    for row in encoded(checkpoint):
        if has_control_text(row, checkpoint):
            continue
        cuts = [0, *_answer_starts(row, checkpoint.family), len(row["text"])]
        pieces = [row["text"][start:end] for start, end in pairwise(cuts)]
        expected = [
            id_ for piece in pieces for id_ in checkpoint.tokenizer(piece, add_special_tokens=False)["input_ids"]
        ]
        sample = checkpoint.encode(read_turns(row, checkpoint.family), row["tools"] or ())
        assert sample.input_ids == expected, row["name"]


def test_control_tokens_in_messages_give_no_control_ids(checkpoint: Checkpoint) -> None:
    for row in encoded(checkpoint):
        turns = read_turns(row, checkpoint.family)
        placed = len(render(turns, checkpoint.family, tools=row["tools"] or ()))
        ids = checkpoint.encode(turns, row["tools"] or ()).input_ids
        assert ids.count(IM_START) == ids.count(IM_END) == placed, row["name"]
        assert sum(id_ in SPECIALS for id_ in ids) == 2 * placed, row["name"]


def test_prompts_equal_the_template_and_are_prefixes_of_the_training_ids(checkpoint: Checkpoint) -> None:
    for row in encoded(checkpoint):
        turns, tools = read_turns(row, checkpoint.family), row["tools"] or ()
        sample = checkpoint.encode(turns, tools)
        starts = [start for start, _ in trained_runs(sample)]
        prompts = []
        for index, turn in enumerate(turns):
            if turn.role != "assistant" or index == 0:
                continue
            rendered = render_prompt(turns[:index], checkpoint.family, tools=tools)
            template = checkpoint.template(row["messages"][:index], tools, prompt=True)
            assert text_of(rendered) == template, (row["name"], index)
            prompt = encode_prompt(rendered, checkpoint.tokenizer)
            if sample.input_ids[: len(prompt)] == prompt:
                prompts.append(len(prompt))
        assert set(starts) <= set(prompts), row["name"]
        assert len(starts) == len(row["spans"]), row["name"]


IN_FIELD = Turn("assistant", "2", thinking="add")
IN_TEXT = Turn("assistant", "<think>\nadd\n</think>\n\n2")


def test_thinking_is_trained_if_supported_and_refused_if_not(checkpoint: Checkpoint) -> None:
    ask = Turn("user", "1+1?")
    thinking = checkpoint.family.thinking
    start = f"<|im_start|>assistant\n{checkpoint.family.prompt_suffix}"
    if thinking == "none":
        with pytest.raises(
            DataError, match=r"^here: turn 2 has a field with thinking, which the chat format 'chatml.*' does not"
        ):
            checkpoint.encode([ask, IN_FIELD])
    else:
        assert checkpoint.encode([ask, IN_FIELD]) == checkpoint.encode([ask, IN_TEXT])
    encoded = checkpoint.encode([ask, IN_TEXT])
    decode = checkpoint.encoder().decode
    text = decode(encoded.input_ids)
    trained = [decode(encoded.input_ids[first:end]) for first, end in trained_runs(encoded)]
    if thinking == "stripped":
        assert text.endswith("<|im_start|>assistant\n2<|im_end|>\n") and trained == []
    elif checkpoint.family.prompt_suffix == EMPTY_THOUGHT:
        # The prompt says that there is no thinking.
        assert text.endswith("<|im_start|>assistant\n<think>\nadd\n</think>\n\n2<|im_end|>\n") and trained == []
    else:
        whole = "<|im_start|>assistant\n<think>\nadd\n</think>\n\n2<|im_end|>\n"
        assert text.endswith(whole) and trained == [whole.removeprefix(start)]


@pytest.mark.parametrize(
    ("changed", "to"), [("# Tools", "## Tools"), ("{%- if tools %}", "{%- if tools %}{{- raise_exception('no') }}")]
)
def test_tools_are_refused_if_no_tool_form_matches_the_template(shared: Path, changed: str, to: str) -> None:
    checkpoint = load_family(shared, "qwen3")
    checkpoint.tokenizer.chat_template = str(checkpoint.tokenizer.chat_template).replace(changed, to, 1)
    family = family_of(checkpoint.tokenizer)
    assert (family.name, family.tool_form, family.knows_thinking) == ("chatml-hybrid", None, True)
    with pytest.raises(DataError, match=r"^here: the chat format 'chatml-hybrid' cannot write tools and calls"):
        replace(checkpoint, family=family).encode([Turn("user", "Hi"), Turn("assistant", "Hi")], [{"name": "f"}])


def test_thinking_is_refused_if_the_template_writes_it_in_an_unknown_way(shared: Path) -> None:
    checkpoint = load_family(shared, "qwen3")
    # As some templates for training: all answers keep their thinking.
    checkpoint.tokenizer.chat_template = (
        str(checkpoint.tokenizer.chat_template)
        .replace("loop.last or (not loop.last and reasoning_content)", "loop.last or reasoning_content")
        .replace("loop.index0 > ns.last_query_index", "loop.index0 > ns.last_query_index or reasoning_content")
    )
    family = family_of(checkpoint.tokenizer)
    assert (family.name, family.knows_thinking, family.tool_form) == ("chatml-hybrid", False, HERMES_FORMS[2])
    changed = replace(checkpoint, family=family)
    for answer in (IN_TEXT, IN_FIELD, Turn("assistant", "add</think>2")):
        with pytest.raises(
            DataError, match=r"^here: turn 2 contains thinking, which the checkpoint's chat template writes"
        ):
            changed.encode([Turn("user", "1+1?"), answer])
    assert changed.encode([Turn("user", "what is <think>?"), Turn("assistant", "a tag")]).input_ids


def test_every_answer_style_has_a_family() -> None:
    assert {style.name for style in (*ANSWER_STYLES, *STRICT_STYLES)} == {*STYLES.values(), *STRICT.values()}
