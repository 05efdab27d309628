"""A scripted engine, and a server with it in a thread: what the server makes of what a model writes."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import uvicorn

from chat.chatml import IM_END, IM_START
from chat.families import EMPTY_THOUGHT, QWEN_V1, Family
from serving.api.app import build_app
from serving.api.connection import LimitedConnection
from serving.api.settings import Settings
from serving.formats import Formats, TemplateOptions
from serving.rendering import check_tools, parse_messages, render_turns
from serving.requests import (
    ClosedError,
    FinishReason,
    Load,
    Piece,
    QueueFullError,
    Request,
    RequestError,
    Sampling,
    TokenLogprob,
    UnknownModelError,
    Usage,
)
from serving.ticket import Ticket

_DEFAULT = TemplateOptions()

Script = Callable[[Request], Sequence[str]]


class CharacterTokenizer:
    """Ids are code points; the two control tokens have ids of their own."""

    _CONTROL = {IM_START: -1, IM_END: -2}

    def encode_plain(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def convert_tokens_to_ids(self, token: str) -> int:
        return self._CONTROL[token]

    def text_of(self, ids: Sequence[int]) -> str:
        names = {id_: token for token, id_ in self._CONTROL.items()}
        return "".join(names.get(id_) or chr(id_) for id_ in ids)


class ScriptedEngine:
    """Answers each request with the pieces of a script, with the interface of ``serving.engine.Engine``.

    Args:
        script: pieces of the answer to a request.
        pause: seconds before each piece.
        places: requests that can run and wait.
    """

    model_name, adapters, context_length, defaults = "tiny", ("poet",), 100_000, Sampling()

    def __init__(self, script: Script, family: Family = QWEN_V1, pause: float = 0.0, places: int = 1000) -> None:
        self.family, self.tokenizer = family, CharacterTokenizer()
        self.requests: list[Request] = []
        self.tickets: list[Ticket] = []
        self.is_closed = False
        self._script, self._pause, self._places = script, pause, places
        self._answered = 0

    def adapter_of(self, model: str) -> str | None:
        known = {self.model_name: None, **{name: name for name in self.adapters}}
        known |= {f"{self.model_name}:{name}": name for name in self.adapters}
        if model not in known:
            raise UnknownModelError("model", f"{model!r} is not loaded")
        return known[model]

    def family_of(self, options: TemplateOptions) -> Family:
        template = "enable_thinking" if self.family.has_thinking else ""
        return Formats(self.family, self._family_with, template).family(options)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        system: str | None = None,
        options: TemplateOptions = _DEFAULT,
    ) -> tuple[int, ...]:
        family = self.family_of(options)
        return render_turns(parse_messages(messages, family), check_tools(tools), family, self.tokenizer, system)

    def _family_with(self, enable_thinking: bool) -> Family:
        """Return the format of a template that knows this argument, as that of Qwen3."""
        return self.family if enable_thinking else replace(self.family, prompt_suffix=EMPTY_THOUGHT)

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode_plain(text))

    def prompt_of(self, index: int = -1) -> str:
        """Return the text of a request's prompt."""
        return self.tokenizer.text_of(self.requests[index].prompt_ids)

    def submit(self, request: Request) -> Ticket:
        if self.is_closed:
            raise ClosedError
        if len(request.prompt_ids) > self.context_length:
            raise RequestError("messages", "the prompt is too long")
        if self.load_now().running >= self._places:
            raise QueueFullError("the queue is full")
        ticket = Ticket(request)
        self.requests.append(request)
        self.tickets.append(ticket)
        threading.Thread(target=self._answer, args=(ticket,), daemon=True).start()
        return ticket

    def _answer(self, ticket: Ticket) -> None:
        reason: FinishReason = "stop"
        for index, text in enumerate(self._script(ticket.request), 1):
            time.sleep(self._pause)
            if ticket.is_cancelled:
                reason = "cancelled"
                break
            most = ticket.request.sampling.max_tokens
            if most is not None and index > most:
                reason = "length"
                break
            ticket.usage = Usage(len(ticket.request.prompt_ids), index)
            ticket.deliver(Piece(text, (index,), self._logprobs(ticket.request, text)))
        self._answered += 1
        ticket.finish(reason)

    @staticmethod
    def _logprobs(request: Request, text: str) -> tuple[TokenLogprob, ...]:
        if request.sampling.logprobs is None:
            return ()
        tops = tuple(TokenLogprob(n, b"x", -1.0 * n) for n in range(request.sampling.logprobs))
        return (TokenLogprob(7, text.encode(), -0.5, tops),)

    def load_now(self) -> Load:
        return Load(len(self.tickets) - self._answered, 0, self._answered, 0, 0)

    def close(self, drain: bool = True) -> None:
        self.is_closed = True


@contextmanager
def served(engine: Any, settings: Settings | None = None) -> Iterator[str]:
    """Serve an engine on a free port of this machine and give its address."""
    # asyncio sends small packets at once only where the protocol is named.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        app = build_app(engine, settings or Settings())
        config = uvicorn.Config(app, http=LimitedConnection, log_level="error", lifespan="on")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.005)
            assert thread.is_alive()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)
            assert not thread.is_alive(), "a request did not end"


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait for what another thread does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.01)
