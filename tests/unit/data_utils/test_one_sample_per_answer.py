"""Conversations as samples of one answer each: ids, weights, truncation, counts and sets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chat.families import ANSWER_STYLES, QWEN_V1
from chat.turns import Turn
from data_utils.encode import EncodedConversation, EncodeOptions, Encoder
from data_utils.report.terminal import render_report
from data_utils.schema import Conversation
from errors import DataError
from tests.chats import PROFILE, Subject, chats
from tests.data import load, reader
from tests.encoding import weights_of
from tests.families import STRICT, load_family, turns_of
from tests.unit.chat.test_samples import ASK, PAIRS, PLAIN, THOUGHT, recorded

PROMPTS = {"qwen3_5_nothink": ({"enable_thinking": True}, {}), "qwen3_8": ({}, {"enable_thinking": False})}
NO_SWITCH = ANSWER_STYLES[0]


def weighted_ids(encoded: EncodedConversation) -> list[tuple[int, float]]:
    """Return the trained ids with their weights."""
    return [pair for pair in zip(encoded.input_ids, weights_of(encoded), strict=True) if pair[1]]


@pytest.mark.parametrize("name", ["qwen3", *STRICT])
def test_each_answer_is_trained_behind_the_prompt_of_its_mode(shared: Path, name: str) -> None:
    """Text and trained text of all recorded conversations, from turns to ids and back."""
    kwargs = PROMPTS.get(name, ({}, {"enable_thinking": False}))
    checkpoint, plain = load_family(shared, name, kwargs[0]), load_family(shared, name, kwargs[1]).family
    options = EncodeOptions(thinking="auto", split_turns="always")
    encoder = Encoder(checkpoint.tokenizer, checkpoint.family, options, plain)
    compared = 0
    for row in recorded(shared, name):
        if not checkpoint.family.has_thinking_in_text and "</think>" in str(row["messages"]):
            continue  # moved to its field, which the template does not do
        modes = [next(mode for mode in row["modes"] if mode["kwargs"] == each) for each in kwargs]
        expected = [
            next(iter(chosen))
            for turn in range(len(row["messages"]))
            if (
                chosen := [
                    (sample["text"], sample["text"][slice(*sample["spans"][0])])
                    for mode, thinks in zip(modes, (True, False), strict=True)
                    for sample in mode["samples"]
                    if (sample["turn"], sample["has_thoughts"]) == (turn, thinks)
                ]
            )
        ]
        conversation = Conversation(tuple(turns_of(row)), "here", tuple(row["tools"] or ()))
        samples = [sample for sample in encoder.encode(conversation) if sample.trained_tokens]
        decoded = [
            (encoder.decode(each.input_ids), encoder.decode([id_ for id_, _ in weighted_ids(each)])) for each in samples
        ]
        assert decoded == expected, row["name"]
        compared += len(expected)
    assert compared >= 20


@PROFILE
@given(st.data())
def test_samples_of_answers_train_together_what_the_conversation_trains(subject: Subject, data: st.DataObject) -> None:
    """Of formats that write an answer the same everywhere: the same ids with the same weights, each once."""
    family, conversation = data.draw(chats(subject))
    if family.has_thinking or not family.prompts_after_answer:
        family = QWEN_V1 if subject.is_v1 else NO_SWITCH
        conversation = replace(conversation, tools=(), turns=tuple(_plain(turn) for turn in conversation.turns))
    last = max((index for index, turn in enumerate(conversation.turns) if turn.role == "assistant"), default=None)
    if last is None or conversation.turns[last].weight == 0:
        return
    conversation = replace(conversation, turns=conversation.turns[: last + 1])
    mask = data.draw(st.sampled_from(["assistant", "qwen", "last", "all"]))
    whole, split = (
        subject.fresh_encoder(family, label_mask=mask, split_turns=how).encode(conversation)
        for how in ("never", "always")
    )
    assert [pair for sample in split for pair in weighted_ids(sample)] == weighted_ids(whole[0])
    assert sum(sample.answers for sample in split) == whole[0].answers


def _plain(turn: Turn) -> Turn:
    return Turn("user" if turn.role == "tool" else turn.role, turn.content, (), turn.weight)


FOUR = (Turn("user", "Hi"), PLAIN, Turn("user", "Why? " * 9), PLAIN)


def encoder_of(subject: Subject, name: str, **options: Any) -> Encoder:
    family, plain = PAIRS[name]
    return Encoder(subject.tokenizer, family, EncodeOptions(**options), plain)


@pytest.fixture(scope="module")
def fast(golden_small: Path, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    from tests.chats import load_subject

    return load_subject("fast", golden_small, tmp_path_factory.mktemp("fast"))


def test_a_sample_that_is_too_long_keeps_its_answer_or_is_left_out(fast: Subject) -> None:
    split: dict[str, Any] = {"thinking": "auto", "split_turns": "auto"}
    first, second = encoder_of(fast, "chatml-3.5", **split).encode(Conversation(FOUR, "here"))
    alone = encoder_of(fast, "chatml-3.5", **split).encode(Conversation(FOUR[2:], "here"))
    most = len(second.input_ids) - 1
    assert len(first.input_ids) < len(alone[0].input_ids) <= most
    kept = {
        truncation: encoder_of(fast, "chatml-3.5", **split, max_length=most, truncation=truncation).encode(
            Conversation(FOUR, "here")
        )
        for truncation in ("turns", "turns_left", "cut", "drop")
    }
    assert [samples[0] for samples in kept.values()] == [first] * 4
    assert (kept["turns"][1].input_ids, kept["turns"][1].full_length) == ([], most + 1)
    assert kept["drop"][1].input_ids == []
    assert kept["turns_left"][1].input_ids == alone[0].input_ids
    assert kept["turns_left"][1].spans == alone[0].spans
    assert kept["cut"][1].input_ids == second.input_ids[:most]
    with pytest.raises(DataError, match=rf"^here: the conversation has {most + 1} tokens, more than --model_max"):
        encoder_of(fast, "chatml-3.5", **split, max_length=most, truncation="error").encode(Conversation(FOUR, "here"))


def test_an_answer_without_any_prompt_gives_no_sample(fast: Subject) -> None:
    encoder = encoder_of(fast, "chatml-3.5", thinking="auto", split_turns="always")
    assert [sample.trained_tokens for sample in encoder.encode(Conversation((PLAIN, ASK), "here"))] == [0]
    [sample] = encoder.encode(Conversation((PLAIN, ASK, PLAIN), "here"))
    assert sample.answers == 1


def write(path: Path, *conversations: tuple[Turn, ...]) -> Path:
    records = [
        {
            "messages": [
                {"role": turn.role, "content": turn.content}
                | ({"reasoning_content": turn.thinking} if turn.thinking else {})
                for turn in turns
            ]
        }
        for turns in conversations
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_reports_count_answers_samples_and_what_splitting_adds(fast: Subject, tmp_path: Path) -> None:
    opening = (PLAIN, ASK, PLAIN)
    data = write(tmp_path / "a.jsonl", FOUR, (ASK, THOUGHT), opening)
    encoder = encoder_of(fast, "chatml-hybrid", thinking="auto", split_turns="auto")
    examples = load(encoder, f"{data}@x2")
    lengths = [len(sample.input_ids) for sample in encoder.encode(Conversation(FOUR, "here"))]
    total = examples.report.total()
    assert (total.read, total.kept, total.samples, len(examples)) == (6, 6, 8, 8)
    assert (total.answers, total.answers_trained, total.answers_with_thinking) == (10, 8, 2)
    assert (total.split, total.split_samples, total.repeated_tokens) == (2, 4, 2 * lengths[0])
    shown = " ".join(render_report(examples.report, color=False).split())
    assert "8 of 10 answers are trained, 2 of them with thinking, each behind the prompt that fits it" in shown
    assert "2 of 6 conversations are split into 4 samples, one for each answer (--split_turns auto)" in shown
    assert [examples.where(index).rpartition(":")[2] for index in range(8)] == [*"11112233"]


def test_all_samples_of_a_conversation_are_in_one_set(fast: Subject, tmp_path: Path) -> None:
    chats_ = [tuple(Turn(turn.role, f"{turn.content} {number}") for turn in FOUR) for number in range(10)]
    encoder = encoder_of(fast, "chatml-3.5", thinking="auto", split_turns="auto")
    held_out = reader(encoder, f"{write(tmp_path / 'a.jsonl', *chats_)}#6", eval_share=0.5)
    lines: dict[str, list[int]] = {"train": [], "eval": []}
    for kept in held_out.read():
        lines[kept.set_name].append(kept.where.line or 0)
    assert {name: len(each) for name, each in lines.items()} == {"train": 6, "eval": 6}
    assert not {*lines["train"]} & {*lines["eval"]}
    assert all(each.count(line) == 2 for each in lines.values() for line in each)


def test_a_warning_says_that_thinking_would_be_unlearnt(fast: Subject, tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", (ASK, PLAIN))
    thoughts = write(tmp_path / "b.jsonl", (ASK, THOUGHT))
    for name, thinking, files, warns in (
        ("chatml-3.5", "auto", [data], True),
        ("chatml-3.5", "auto", [data, thoughts], False),
        ("chatml-3.5", "mixed", [data], False),
        ("chatml", "auto", [data], False),
    ):
        encoder = encoder_of(fast, name, thinking=thinking, split_turns="auto")
        warnings = load(encoder, *files).report.warnings()
        assert any("no answer brings thinking" in line for line in warnings) == warns, (name, thinking)


def test_thinking_is_removed_or_refused_with_the_line(fast: Subject, tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", (ASK, THOUGHT))
    encoder = encoder_of(fast, "chatml", thinking="off")
    [line] = load(encoder, data).report.warnings()
    assert "1 of 1 conversations contain thinking, which is removed (--thinking off)" in line
    with pytest.raises(DataError, match=r"a\.jsonl:1: turn 2 has a field with thinking, .* remove all thinking with"):
        load(encoder_of(fast, "chatml", thinking="auto"), data)
    only = Encoder(fast.tokenizer, ANSWER_STYLES[3], EncodeOptions(thinking="auto", split_turns="auto"))
    with pytest.raises(DataError, match=r"b\.jsonl:2: no answer brings thinking, with which every answer of"):
        load(only, write(tmp_path / "b.jsonl", (ASK, THOUGHT), (ASK, PLAIN)))
    [line] = load(only, write(tmp_path / "c.jsonl", (ASK, PLAIN, ASK, THOUGHT))).report.warnings()
    assert "have answers without the thinking that the chat format 'chatml-thinking' needs, which are not" in line
