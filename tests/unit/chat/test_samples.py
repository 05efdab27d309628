"""One sample per answer: those recorded with the official templates, and the choice of prompts and samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chat.answers import move_thinking
from chat.detect import as_template_reads
from chat.families import ANSWER_STYLES, EMPTY_THOUGHT, STRICT_STYLES, Family
from chat.render import render_answer, text_of
from chat.samples import Sample, SampleRules
from chat.turns import Turn
from tests.families import STRICT, STYLES, load_family, trained_spans, turns_of

WITHOUT_ROWS = {"qwen1_5", "qwen2_5_coder", "qwen2_5_launch"}  # aliases, and a template without cases


def recorded(shared: Path, name: str) -> list[Any]:
    rows: dict[str, list[Any]] = json.loads((shared / "families" / "expected_split.json").read_text(encoding="utf-8"))
    return rows[name]


@pytest.mark.parametrize("name", [name for name in (*STYLES, *STRICT) if name not in WITHOUT_ROWS])
def test_samples_equal_the_recorded_ones(shared: Path, name: str) -> None:
    """Text and trained characters; ``auto`` divides exactly the conversations that the plain rule trains otherwise."""
    families: dict[str, Family] = {}
    compared = 0
    for row in recorded(shared, name):
        for mode in row["modes"]:
            key = json.dumps(mode["kwargs"])
            family = families[key] = families.get(key) or load_family(shared, name, mode["kwargs"]).family
            turns, tools = as_template_reads(turns_of(row), family), row["tools"] or ()
            samples = {}
            for sample in SampleRules(family, family, "on", "always").plan(turns):
                if family.is_strict and sample.end == 1:
                    continue  # without a question, which is refused
                rendered = render_answer(
                    turns[: sample.end], family, tools=tools, trained_from=sample.trained_from or 0
                )
                if spans := trained_spans(rendered):
                    samples[sample.end - 1] = text_of(rendered), spans
            expected = {sample["turn"]: (sample["text"], sample["spans"]) for sample in mode["samples"]}
            assert samples == expected, (row["name"], key)
            trained_otherwise = {*mode["dropped_by_the_rule"], *mode["trained_otherwise"]}
            trained_otherwise -= {answer["turn"] for answer in mode["not_expressible"]}
            plan = SampleRules(family, family, "on", "auto").plan(turns)
            assert (plan[0].trained_from is not None) == bool(trained_otherwise), (row["name"], key)
            compared += 1
    assert compared >= len(families) > 0


ASK, PLAIN = Turn("user", "Why?"), Turn("assistant", "So.")
THOUGHT = Turn("assistant", "So.", thinking="Because.")
ANSWERS_TWICE = (ASK, PLAIN, ASK, PLAIN)
HYBRID, HYBRID_PLAIN = ANSWER_STYLES[2], ANSWER_STYLES[6]
THINKING = ANSWER_STYLES[3]
BLOCKS = {
    style.prompt_suffix: style for style in STRICT_STYLES if style.name == "chatml-3.5" and style.thinking == "blocks"
}
KEPT = {
    style.prompt_suffix: style for style in STRICT_STYLES if style.name == "chatml-3.8" and style.thinking == "kept"
}
PAIRS = {
    "chatml": (ANSWER_STYLES[0], ANSWER_STYLES[0]),
    "chatml-hybrid": (HYBRID, HYBRID_PLAIN),
    "chatml-3.5": (BLOCKS["<think>\n"], BLOCKS[EMPTY_THOUGHT]),
    "chatml-3.8": (KEPT["<think>\n"], KEPT[EMPTY_THOUGHT]),
}


def rules(name: str, thinking: Any = "auto", split_turns: Any = "auto", label_mask: Any = "assistant") -> SampleRules:
    return SampleRules(*PAIRS[name], thinking, split_turns, label_mask)


@pytest.mark.parametrize(
    ("name", "turns", "plan"),
    [
        ("chatml", ANSWERS_TWICE, [Sample(True, 4)]),
        ("chatml-hybrid", (ASK, PLAIN), [Sample(False, 2)]),
        ("chatml-hybrid", (ASK, THOUGHT), [Sample(True, 2)]),
        ("chatml-hybrid", ANSWERS_TWICE, [Sample(False, 2, 0), Sample(False, 4, 2)]),
        ("chatml-hybrid", (ASK, THOUGHT, ASK, PLAIN), [Sample(True, 2, 0), Sample(False, 4, 2)]),
        ("chatml-3.5", ANSWERS_TWICE, [Sample(False, 2, 0), Sample(False, 4, 2)]),
        ("chatml-3.5", (ASK, THOUGHT, ASK, THOUGHT), [Sample(True, 2, 0), Sample(True, 4, 2)]),
        ("chatml-3.8", ANSWERS_TWICE, [Sample(False, 4)]),
        ("chatml-3.8", (ASK, THOUGHT, ASK, THOUGHT), [Sample(True, 4)]),
        ("chatml-3.8", (ASK, THOUGHT, ASK, PLAIN), [Sample(True, 2, 0), Sample(False, 4, 2)]),
        # An answer that is not trained asks for nothing.
        ("chatml-3.5", (ASK, PLAIN._replace(weight=0.0), ASK, THOUGHT), [Sample(True, 4)]),
        ("chatml-hybrid", (PLAIN, ASK, PLAIN), [Sample(False, 3)]),
    ],
)
def test_auto_takes_the_prompt_and_the_samples_that_fit(name: str, turns: tuple[Turn, ...], plan: list[Sample]) -> None:
    assert rules(name).plan(turns) == rules(name, "mixed").plan(turns) == plan


def test_modes_and_masks_decide_for_all_answers() -> None:
    mixed = (ASK, THOUGHT, ASK, PLAIN)
    assert rules("chatml-3.5", "on").plan(mixed) == [Sample(True, 2, 0), Sample(True, 4, 2)]
    off = rules("chatml-3.5", "off")
    assert off.plan(off.read(mixed)) == [Sample(False, 2, 0), Sample(False, 4, 2)]
    assert [turn.thinking for turn in off.read(mixed)] == [None, "", None, None]
    assert rules("chatml-3.5", split_turns="never").plan(mixed) == [Sample(False, 4)]
    assert rules("chatml-3.5", label_mask="last").plan(mixed) == [Sample(False, 4)]
    assert rules("chatml-3.5", label_mask="all").plan((ASK, THOUGHT, ASK, THOUGHT)) == [Sample(True, 4)]
    assert rules("chatml", split_turns="always").plan(mixed) == [Sample(True, 2, 0), Sample(True, 4, 2)]
    weighted = (ASK, PLAIN._replace(weight=0.5), ASK, PLAIN)
    assert rules("chatml", "auto", "always", "last").plan(weighted) == [Sample(True, 2, 0), Sample(True, 4, 2)]


def test_thinking_in_text_is_removed_or_moved_to_its_field() -> None:
    in_text = Turn("assistant", "<think>\nBecause.\n</think>\n\nSo.")
    [_, removed] = rules("chatml", "off").read((ASK, in_text))
    assert (removed.content, removed.thinking) == ("So.", "")
    assert rules("chatml-3.8").read((ASK, in_text)) == (ASK, move_thinking(in_text)) == (ASK, THOUGHT)
    assert rules("chatml-3.5").read((ASK, in_text)) == (ASK, in_text)


def test_models_that_always_think_train_no_answer_without_thinking() -> None:
    only = SampleRules(THINKING, THINKING, "auto", "auto")
    assert only.lacks_thinking(ANSWERS_TWICE)
    mixed = (ASK, PLAIN, ASK, THOUGHT)
    assert not only.lacks_thinking(mixed)
    assert [turn.weight for turn in only.read(mixed)] == [None, 0.0, None, None]
    assert only.plan(only.read(mixed)) == [Sample(True, 4)]
    asked_for = SampleRules(THINKING, THINKING, "on", "auto")
    assert not asked_for.lacks_thinking(ANSWERS_TWICE)
    assert asked_for.read(ANSWERS_TWICE) == ANSWERS_TWICE
