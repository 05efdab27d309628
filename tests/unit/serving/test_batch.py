"""Answers in a batch whose rows come and go are those that each prompt gets alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from serving import scheduler
from tests.serving import GREEDY, alone, answers, load_base, load_engine, requests, write_checkpoint

KINDS = ("qwen", "qwen2", "qwen3", "qwen3_5_text", "windows")


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("serving") / request.param, request.param)


def test_answers_together_equal_those_alone(folder: Path) -> None:
    asked = [replace(each, sampling=replace(GREEDY, max_tokens=5 + 3 * n)) for n, each in enumerate(requests(9))]
    model = load_base(folder)
    expected = [alone(model, request) for request in asked]
    with load_engine(folder, max_concurrency=4) as engine:
        assert answers(engine, asked) == expected


def test_rows_that_join_and_leave_change_no_answer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "PROMPT_TOKENS_BESIDE_ANSWERS", 16)  # prompts in several parts
    asked = [replace(each, sampling=replace(GREEDY, max_tokens=30)) for each in requests(6)]
    model = load_base(folder)
    expected = [alone(model, request) for request in asked]
    with load_engine(folder) as engine:
        first = [engine.submit(request) for request in asked[:2]]
        started = [iter(ticket) for ticket in first]
        pieces = [next(each) for each in started]
        left = engine.submit(asked[2])
        later = [engine.submit(request) for request in asked[3:]]
        next(iter(left))
        left.cancel()
        got = [
            piece.token_ids + tuple(id_ for rest in each for id_ in rest.token_ids)
            for piece, each in zip(pieces, started, strict=True)
        ]
        got += [ticket.answer().token_ids for ticket in later]
    assert got == expected[:2] + expected[3:]
    assert left.finish_reason == "cancelled" and left.usage.completion_tokens < 30


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_eight_bit_rows_do_not_depend_on_their_neighbours(folder: Path, kind: str) -> None:
    asked = requests(5)
    with load_engine(folder, kv_cache=kind, max_concurrency=3) as engine:
        alone_in_turn = [engine.submit(request).answer().token_ids for request in asked]
        assert answers(engine, asked) == alone_in_turn


def test_device_map_gives_the_same_answers(folder: Path) -> None:
    asked = requests(3)
    with load_engine(folder) as engine, load_engine(folder, device_map="auto") as spread:
        assert answers(spread, asked) == answers(engine, asked)
