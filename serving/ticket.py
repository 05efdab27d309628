"""A submitted request: its answer while it grows, for threads and for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from queue import Empty, SimpleQueue

from serving.requests import Answer, FinishReason, Piece, Request, TokenLogprob, Usage


class Ticket:
    """The answer to a request, in pieces. It is read once, by one reader: ``for``, ``async for``, ``answer``.

    Attributes:
        request: what was asked.
        submitted: ``time.monotonic()`` of its submission.
        usage: tokens so far.
        finish_reason: why the answer ended; ``None`` while it grows, and after an error.
    """

    def __init__(self, request: Request, wake: Callable[[], object] = lambda: None) -> None:
        """
        Args:
            wake: called after a cancellation, so that the engine notices it.
        """
        self.request = request
        self.submitted = time.monotonic()
        self.usage = Usage(len(request.prompt_ids), 0)
        self.finish_reason: FinishReason | None = None
        self._pieces: SimpleQueue[Piece | BaseException | None] = SimpleQueue()
        self._wake_engine = wake
        self._wake_reader: Callable[[], object] = lambda: None
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Stop the answer. Its place is free for another request before the next token."""
        self._cancelled.set()
        self._wake_engine()

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()

    def __iter__(self) -> Iterator[Piece]:
        """Yield the pieces of the answer as they come.

        Raises:
            Exception: what ended the request.
        """
        while (item := self._pieces.get()) is not None:
            yield _piece(item)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()
        self._wake_reader = lambda: loop.call_soon_threadsafe(arrived.set)
        while True:
            arrived.clear()
            try:
                item = self._pieces.get_nowait()
            except Empty:
                await arrived.wait()
                continue
            if item is None:
                return
            yield _piece(item)

    def answer(self) -> Answer:
        """Wait for the whole answer."""
        return self._joined(list(self))

    async def answer_async(self) -> Answer:
        """Wait for the whole answer without blocking the event loop."""
        return self._joined([piece async for piece in self])

    def _joined(self, pieces: list[Piece]) -> Answer:
        assert self.finish_reason is not None, "read to its end"
        ids = tuple(id_ for piece in pieces for id_ in piece.token_ids)
        logprobs: tuple[TokenLogprob, ...] = tuple(each for piece in pieces for each in piece.logprobs)
        return Answer("".join(piece.text for piece in pieces), ids, logprobs, self.usage, self.finish_reason)

    # ------------------------------------------------------------------------------------------ called by the engine

    def deliver(self, piece: Piece) -> None:
        """Add a piece."""
        self._put(piece)

    def finish(self, reason: FinishReason) -> None:
        """End the answer."""
        self.finish_reason = reason
        self._put(None)

    def fail(self, error: BaseException) -> None:
        """End the answer with an error, which its reader raises."""
        self._put(error)

    def _put(self, item: Piece | BaseException | None) -> None:
        self._pieces.put(item)
        with contextlib.suppress(RuntimeError):  # the reader's event loop is closed
            self._wake_reader()


def _piece(item: Piece | BaseException) -> Piece:
    if isinstance(item, BaseException):
        raise item
    return item
