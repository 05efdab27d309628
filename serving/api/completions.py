"""``/v1/completions``: plain texts that the model continues, without a chat format."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from serving.api.errors import JsonResponse
from serving.api.running import (
    EventStream,
    Service,
    ending_of,
    in_thread,
    note,
    pieces_of,
    sampling_of,
    submit_all,
    usage_of,
    watched,
)  # fmt: skip
from serving.api.schemas import CompletionRequest
from serving.requests import FinishReason, Piece, RequestError, TokenLogprob
from serving.ticket import Ticket

_LOG = logging.getLogger("serving.texts")
_DEFAULT_TOKENS = 16  # as in OpenAI's API


class _Text:
    """A continuation while it grows."""

    def __init__(self, index: int, has_logprobs: bool) -> None:
        self.index, self.text = index, ""
        self._has_logprobs = has_logprobs
        self._tokens: list[TokenLogprob] = []
        self._offset = 0  # characters of the tokens that have been taken

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self._tokens += piece.logprobs

    def choice(self, text: str, reason: FinishReason | None) -> dict[str, Any]:
        """Return OpenAI's choice, with the tokens since the last one."""
        word = reason and ("stop" if reason == "stop" else "length")
        return {"index": self.index, "text": text, "logprobs": self._take_logprobs(), **ending_of(word, reason)}

    def _take_logprobs(self) -> dict[str, Any] | None:
        tokens, self._tokens = self._tokens, []
        if not self._has_logprobs:
            return None
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token.text)
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{other.text: other.logprob for other in token.top} for token in tokens],
            "text_offset": offsets,
        }


async def create_completion(service: Service, request: Request, body: CompletionRequest) -> Response:
    """Continue one or several texts."""
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    if not prompts or not all(prompts):
        raise RequestError("prompt", "is empty")
    adapter = service.engine.adapter_of(body.model)
    sampling = sampling_of(body, service, body.max_tokens, body.logprobs, default_tokens=_DEFAULT_TOKENS)
    ids: Sequence[tuple[int, ...]] = await in_thread(lambda: [service.engine.encode(prompt) for prompt in prompts])
    tickets = submit_all(service, ids, sampling, adapter, body.n)
    texts = [_Text(index, body.logprobs is not None) for index in range(len(tickets))]
    head = {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": body.model,
    }
    if body.stream:
        return EventStream(_chunks(service, request, body, tickets, texts, head), tickets)
    async with watched(request.receive, tickets):
        async for index, piece in pieces_of(service, tickets):
            if piece is not None:
                texts[index].add(piece)
    usage = _finish(service, request, body, tickets, texts)
    choices = [text.choice(text.text, ticket.finish_reason) for text, ticket in zip(texts, tickets, strict=True)]
    return JsonResponse({**head, "choices": choices, "usage": usage})


async def _chunks(
    service: Service,
    request: Request,
    body: CompletionRequest,
    tickets: list[Ticket],
    texts: list[_Text],
    head: dict[str, Any],
) -> AsyncIterator[dict[str, Any]]:
    added = {"usage": None} if body.includes_usage else {}
    async for index, piece in pieces_of(service, tickets):
        if piece is not None:
            texts[index].add(piece)
        reason = tickets[index].finish_reason if piece is None else None
        yield {**head, "choices": [texts[index].choice(piece.text if piece else "", reason)], **added}
    usage = _finish(service, request, body, tickets, texts)
    if body.includes_usage:
        yield {**head, "choices": [], "usage": usage}


def _finish(
    service: Service, request: Request, body: CompletionRequest, tickets: list[Ticket], texts: list[_Text]
) -> dict[str, int]:
    usage = usage_of(tickets, body.n)
    note(request, f"{usage['prompt_tokens']} + {usage['completion_tokens']} tokens")
    if service.settings.log_requests:
        _LOG.info("%s -> %s", body.prompt, [text.text for text in texts])
    return usage
