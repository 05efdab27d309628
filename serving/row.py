"""A request while it is answered: its tokens, its text, and when it ends."""

from __future__ import annotations

import time
from collections.abc import Collection

from serving.requests import FinishReason, Piece, TokenLogprob, Usage
from serving.sampling import Choice, RowSampler
from serving.text_stream import TextStream, TokenBytes
from serving.ticket import Ticket


class Row:
    """One row of a batch.

    Args:
        sampling: of the ticket's request, without ``None`` among the values that choose tokens.
        end_ids: tokens that end the answer.
        timeout: seconds from the ticket's submission; ``None``: unlimited.

    Attributes:
        ids: of the prompt and of the answer so far.
        failures: steps that failed with it; its tokens are then computed again, without other rows.
    """

    def __init__(
        self, ticket: Ticket, sampler: RowSampler, token_bytes: TokenBytes, end_ids: Collection[int],
        timeout: float | None,
    ) -> None:  # fmt: skip
        request = ticket.request
        self.ticket, self.sampler = ticket, sampler
        self.adapter = request.adapter
        self.ids = list(request.prompt_ids)
        self.prompt_length = len(self.ids)
        self.failures = 0
        self._token_bytes = token_bytes
        self._stream = TextStream(token_bytes, sampler.sampling.stop)
        self._end_ids = () if sampler.sampling.ignore_end else end_ids
        self._deadline = None if timeout is None else ticket.submitted + timeout
        self._new_ids: list[int] = []
        self._new_logprobs: list[TokenLogprob] = []

    def accept(self, choice: Choice) -> bool:
        """Add a chosen token, deliver its text, and return whether the answer goes on."""
        self.ids.append(choice.id)
        count = len(self.ids) - self.prompt_length
        self.ticket.usage = Usage(self.prompt_length, count)
        reason: FinishReason | None = None
        if choice.id in self._end_ids:
            text, reason = "", "stop"
        else:
            self._new_ids.append(choice.id)
            if choice.logprob is not None:
                self._new_logprobs.append(self._described(choice))
            text = self._stream.feed(choice.id)
            if self._stream.is_stopped:
                reason = "stop"
            elif count == self.sampler.sampling.max_tokens:
                reason = "length"
        if reason is not None:
            self.end(reason, text)
        elif text:
            self._deliver(text)
        return reason is None

    def end(self, reason: FinishReason, text: str = "") -> None:
        """End the answer, with what its text stream has held back."""
        text += self._stream.close()
        if text or self._new_ids:
            self._deliver(text)
        self.ticket.finish(reason)

    def overdue(self) -> FinishReason | None:
        """Return why the answer must end now, without a next token."""
        if self.ticket.is_cancelled:
            return "cancelled"
        return "timeout" if self._deadline is not None and time.monotonic() >= self._deadline else None

    def _deliver(self, text: str) -> None:
        self.ticket.deliver(Piece(text, tuple(self._new_ids), tuple(self._new_logprobs)))
        self._new_ids, self._new_logprobs = [], []

    def _described(self, choice: Choice) -> TokenLogprob:
        of = self._token_bytes.of
        top = tuple(TokenLogprob(id_, of(id_), logprob) for id_, logprob in choice.top)
        return TokenLogprob(choice.id, of(choice.id), float(choice.logprob or 0), top)
