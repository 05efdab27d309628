"""Requests end as they should: by their limits, their clients, their errors; the engine goes on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from serving.batch import Batch, Runner
from serving.engine import Engine
from serving.requests import ClosedError, QueueFullError, Request, RequestError, Sampling, UnknownModelError
from serving.row import Row
from serving.ticket import Ticket
from tests.models import TINY
from tests.serving import GREEDY, answers, load_engine, prompts, requests

PROMPT = prompts(1)[0]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with load_engine(TINY, max_concurrency=4, queue_size=2) as loaded:
        yield loaded


class Pause:
    """Keeps an engine's thread between two turns."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.going = threading.Event()
        original = engine._scheduler.turn
        monkeypatch.setattr(engine._scheduler, "turn", lambda: (self.going.wait(20), original())[1])


def test_usage_and_finish_reason(engine: Engine) -> None:
    answer = engine.submit(Request(PROMPT, GREEDY)).answer()
    assert answer.finish_reason == "length" and answer.usage.completion_tokens == 12 == len(answer.token_ids)
    assert answer.usage.prompt_tokens == len(PROMPT) and answer.usage.total_tokens == 12 + len(PROMPT)
    assert answer.text == engine.tokenizer.decode(answer.token_ids, skip_special_tokens=True)


def test_end_token_ends_an_answer_and_is_no_part_of_it(engine: Engine) -> None:
    whole = engine.submit(Request(PROMPT, GREEDY)).answer().token_ids
    end = whole[4]
    first = whole.index(end)
    row_of = engine._end_ids
    engine._end_ids = frozenset([end])
    try:
        answer = engine.submit(Request(PROMPT, replace(GREEDY, ignore_end=False))).answer()
    finally:
        engine._end_ids = row_of
    assert answer.finish_reason == "stop" and answer.token_ids == whole[:first]
    assert answer.usage.completion_tokens == first + 1


def test_stop_text_ends_an_answer(engine: Engine) -> None:
    text = engine.submit(Request(PROMPT, GREEDY)).answer().text
    stop = text[3:6]
    answer = engine.submit(Request(PROMPT, replace(GREEDY, stop=(stop, "never there")))).answer()
    assert answer.finish_reason == "stop" and answer.text == text[: text.index(stop)]


def test_end_ids_are_those_of_file_and_family(engine: Engine) -> None:
    named = {"<|im_end|>", "<|im_start|>", "<|endoftext|>"}
    assert {engine.tokenizer.decode([id_]) for id_ in engine._end_ids} == named


def test_answer_ends_with_the_context(engine: Engine) -> None:
    context = engine.context_length
    assert context == 2048
    engine.context_length = len(PROMPT) + 3
    try:
        answer = engine.submit(Request(PROMPT, replace(GREEDY, max_tokens=None))).answer()
        with pytest.raises(RequestError, match="context"):
            engine.submit(Request(PROMPT * 2, GREEDY))
    finally:
        engine.context_length = context
    assert answer.usage.completion_tokens == 3 and answer.finish_reason == "length"


def test_equal_seeds_give_equal_answers_whatever_else_is_answered(engine: Engine) -> None:
    warm = replace(GREEDY, temperature=1.5, top_p=0.9, top_k=40, seed=5)
    [alone] = answers(engine, [Request(PROMPT, warm)])
    others = requests(3, replace(warm, seed=None))
    assert answers(engine, [*others, Request(PROMPT, warm)])[-1] == alone
    assert answers(engine, [Request(PROMPT, replace(warm, seed=6))]) != [alone]


def test_logprobs_belong_to_the_tokens(engine: Engine) -> None:
    answer = engine.submit(Request(PROMPT, replace(GREEDY, logprobs=2))).answer()
    assert tuple(each.token_id for each in answer.logprobs) == answer.token_ids
    assert all(each.top[0].token_id == each.token_id and len(each.top) == 2 for each in answer.logprobs)
    whole = b"".join(each.bytes for each in answer.logprobs).decode(errors="replace")
    assert whole == engine.tokenizer.decode(answer.token_ids)


def test_cancelled_request_frees_its_place(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    pause = Pause(engine, monkeypatch)
    long = replace(GREEDY, max_tokens=1000)
    tickets = [engine.submit(Request(PROMPT, long)) for _ in range(4)]
    waiting = engine.submit(Request(PROMPT, GREEDY))
    for ticket in tickets[1:]:
        ticket.cancel()
    pause.going.set()
    assert waiting.answer().finish_reason == "length"
    assert tickets[0].finish_reason is None
    tickets[0].cancel()
    assert [ticket.answer().finish_reason for ticket in tickets] == ["cancelled"] * 4
    assert engine.load_now().running == 0


def test_full_queue_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with load_engine(TINY, max_concurrency=1, queue_size=2) as engine:
        pause = Pause(engine, monkeypatch)
        long = Request(PROMPT, replace(GREEDY, max_tokens=1000))
        tickets = [engine.submit(long)]
        while not engine.load_now().running:
            pass
        tickets += [engine.submit(long) for _ in range(2)]
        with pytest.raises(QueueFullError):
            engine.submit(long)
        tickets[-1].cancel()
        pause.going.set()
        assert tickets[-1].answer().finish_reason == "cancelled"
        for ticket in tickets:
            ticket.cancel()


def test_time_limit_ends_a_request_as_it_is(engine: Engine) -> None:
    answer = engine.submit(Request(PROMPT, replace(GREEDY, max_tokens=1900), timeout=0.3)).answer()
    assert answer.finish_reason == "timeout" and 0 < len(answer.token_ids) < 1900
    assert engine.submit(Request(PROMPT, GREEDY, timeout=0)).answer().finish_reason == "timeout"


def test_error_of_one_request_ends_only_that_one(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = requests(4)
    expected = answers(engine, asked)
    original = Runner.forward

    def fails(self: Runner, rows: list[Row], *arguments: Any) -> Any:
        if any(row.ids[: len(asked[2].prompt_ids)] == list(asked[2].prompt_ids) for row in rows):
            raise RuntimeError("no memory")
        return original(self, rows, *arguments)

    monkeypatch.setattr(Runner, "forward", fails)
    tickets = [engine.submit(request) for request in asked]
    with pytest.raises(RuntimeError, match="no memory"):
        tickets[2].answer()
    assert [tickets[n].answer().token_ids for n in (0, 1, 3)] == [expected[n] for n in (0, 1, 3)]


def test_failed_step_is_computed_again(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = requests(3)
    expected = answers(engine, asked)
    original, steps = Batch.step, iter(range(100))

    def fails_once(self: Batch) -> torch.Tensor:
        if next(steps) == 5:
            raise RuntimeError("once")
        return original(self)

    monkeypatch.setattr(Batch, "step", fails_once)
    assert answers(engine, asked) == expected


def test_fault_of_the_engine_ends_its_requests_and_not_its_thread(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Batch, "keep", lambda self, rows: 1 / 0)
        with pytest.raises((ZeroDivisionError, RuntimeError)):
            engine.submit(Request(PROMPT, GREEDY)).answer()
    assert engine.submit(Request(PROMPT, GREEDY)).answer().finish_reason == "length"


def test_asyncio_reads_many_streams(engine: Engine) -> None:
    async def text_of(ticket: Ticket) -> str:
        return "".join([piece.text async for piece in ticket])

    async def read() -> list[str]:
        return await asyncio.gather(*(text_of(engine.submit(request)) for request in requests(4)))

    together = asyncio.run(read())
    assert together == [engine.submit(request).answer().text for request in requests(4)]


@pytest.mark.parametrize("drain", [True, False])
def test_close_answers_what_runs_or_ends_it(drain: bool) -> None:
    engine = load_engine(TINY, max_concurrency=2)
    tickets = [engine.submit(Request(PROMPT, replace(GREEDY, max_tokens=200))) for _ in range(4)]
    next(iter(tickets[0]))
    engine.close(drain)
    reasons = [ticket.answer().finish_reason for ticket in tickets]
    assert reasons == ["length" if drain else "cancelled"] * 4
    with pytest.raises(ClosedError):
        engine.submit(Request(PROMPT, GREEDY))


def test_model_names_a_base_or_an_adapter(engine: Engine) -> None:
    assert engine.adapter_of(TINY.name) is None
    for unknown in ("", "other", f"{TINY.name}:other"):
        with pytest.raises(UnknownModelError, match="is not loaded"):
            engine.adapter_of(unknown)
    with pytest.raises(UnknownModelError):
        engine.submit(Request(PROMPT, GREEDY, adapter="other"))
    with pytest.raises(RequestError, match="empty"):
        engine.submit(Request((), GREEDY))


def test_sampling_is_that_of_the_checkpoint(engine: Engine) -> None:
    assert engine.defaults == Sampling(
        temperature=1.0, top_p=0.8, top_k=0, repetition_penalty=1.1, presence_penalty=0.0, frequency_penalty=0.0,
        max_tokens=32,
    )  # fmt: skip
