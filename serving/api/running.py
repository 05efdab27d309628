"""Requests that run: their tickets, pieces as they come, and clients that leave."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serving.api.errors import ApiError, api_error, json_bytes
from serving.api.metrics import Metrics
from serving.api.schemas import SamplingFields
from serving.api.settings import Settings
from serving.requests import FinishReason, Piece, Request, Sampling, Usage, shown
from serving.ticket import Ticket

if TYPE_CHECKING:
    from serving.engine import Engine


@dataclass(frozen=True)
class Service:
    """What the addresses of a server share."""

    engine: Engine
    settings: Settings
    metrics: Metrics = field(default_factory=Metrics)
    created: int = field(default_factory=lambda: int(time.time()))


async def in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run what computes for long, such as tokenising, beside the event loop."""
    return await run_in_threadpool(function, *arguments)


def sampling_of(
    body: SamplingFields,
    service: Service,
    max_tokens: int | None,
    logprobs: int | None,
    added_stops: Sequence[str] = (),
    default_tokens: int | None = None,
) -> Sampling:
    """Return how a request wants its answers.

    Args:
        default_tokens: length limit of a request without one; ``None``: that of the checkpoint. It is lowered to the
            server's.

    Raises:
        RequestError: a value out of its range.
        ApiError: a longer answer than the server gives.
    """
    most = service.settings.most_tokens
    if most is not None and max_tokens is not None and max_tokens > most:
        field = "max_completion_tokens" if "max_completion_tokens" in body.model_fields_set else "max_tokens"
        raise ApiError(400, f"{field}: {shown(max_tokens)} is more than this server's limit of {most}", field)
    limits = [each for each in (most, default_tokens or service.engine.defaults.max_tokens) if each is not None]
    return Sampling(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        seed=body.seed,
        max_tokens=max_tokens or min(limits, default=None),
        stop=(*body.stops, *added_stops),
        logprobs=logprobs,
    )


def submit_all(
    service: Service, prompts: Sequence[tuple[int, ...]], sampling: Sampling, adapter: str | None, n: int
) -> list[Ticket]:
    """Submit each prompt ``n`` times; all or none.

    Answers with a seed get different ones, the first of them the request's.
    """
    most = service.settings.most_choices
    if len(prompts) * n > most:
        raise ApiError(400, f"n: a request may have {most} answers at most, n for each prompt", "n")
    tickets: list[Ticket] = []
    try:
        for index in range(len(prompts) * n):
            seed = None if sampling.seed is None else sampling.seed + index % n
            request = Request(prompts[index // n], replace(sampling, seed=seed), adapter)
            tickets.append(service.engine.submit(request))
    except Exception:
        cancel_all(tickets)
        raise
    return tickets


def cancel_all(tickets: Sequence[Ticket]) -> None:
    for ticket in tickets:
        ticket.cancel()


def ending_of(word: str | None, reason: FinishReason | None) -> dict[str, Any]:
    """Return OpenAI's word for why an answer ended, and what it leaves open: that the answer's time was over."""
    return {"finish_reason": word, **({"stop_reason": "timeout"} if reason == "timeout" else {})}


def usage_of(tickets: Sequence[Ticket], n: int) -> dict[str, int]:
    """Return OpenAI's usage; a prompt that is answered ``n`` times counts once."""
    prompt = sum(ticket.usage.prompt_tokens for ticket in tickets[::n])
    answer = sum(ticket.usage.completion_tokens for ticket in tickets)
    usage = Usage(prompt, answer)
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": usage.total_tokens}


async def pieces_of(service: Service, tickets: Sequence[Ticket]) -> AsyncIterator[tuple[int, Piece | None]]:
    """Yield the pieces of several answers as they come, with the answer's index; ``None`` ends one.

    Raises:
        ApiError: the engine failed.
    """
    arrived: asyncio.Queue[tuple[int, Piece | BaseException | None]] = asyncio.Queue()

    async def read(index: int, ticket: Ticket) -> None:
        is_first = True
        try:
            async for piece in ticket:
                if is_first:
                    service.metrics.first_token.observe(time.monotonic() - ticket.submitted)
                is_first = False
                arrived.put_nowait((index, piece))
            arrived.put_nowait((index, None))
        except Exception as error:
            arrived.put_nowait((index, error))

    tasks = [asyncio.create_task(read(index, ticket)) for index, ticket in enumerate(tickets)]
    try:
        growing = len(tickets)
        while growing:
            index, item = await arrived.get()
            if isinstance(item, BaseException):
                raise api_error(item)
            growing -= item is None
            yield index, item
    finally:
        for task in tasks:
            task.cancel()


@asynccontextmanager
async def watched(receive: Receive, tickets: Sequence[Ticket]) -> AsyncIterator[None]:
    """Cancel tickets when the client leaves, and at the end."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        cancel_all(tickets)

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        cancel_all(tickets)


class EventStream(Response):
    """Server-sent events, which a failure ends with an event that names it."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[dict[str, Any]], tickets: Sequence[Ticket]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._tickets = events, tickets

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_part(part: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": part, "more_body": more})

        async with watched(receive, self._tickets):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for event in self._events:
                    await send_part(b"data: " + json_bytes(event) + b"\n\n")
            except Exception as error:
                await send_part(b"data: " + json_bytes(api_error(error).body()) + b"\n\n", more=False)
            else:
                await send_part(b"data: [DONE]\n\n", more=False)


def note(request: HttpRequest, text: str) -> None:
    """Add a text to the line that is logged about a request."""
    request.scope["note"] = f", {text}"
