"""One answer of a chat: what the model wrote, as OpenAI's message or as the deltas of a stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from chat.events import CallStart, Content, Event, Thinking
from chat.reading import AnswerReader
from serving.api.running import ending_of
from serving.requests import FinishReason, Piece, TokenLogprob

# Limits of length and time end an answer alike: OpenAI knows no other reason.
_REASONS = {"stop": "stop", "length": "length", "timeout": "length", "cancelled": "length"}


class Choice:
    """An answer while it grows.

    Args:
        id_prefix: of the ids of its calls.
        is_legacy: calls are written as ``function_call``, the older form.
        shows_thinking: the model's family has thinking.
        most_calls: calls after which the answer ends; ``None``: any number.
    """

    def __init__(
        self,
        index: int,
        reader: AnswerReader,
        id_prefix: str,
        is_legacy: bool,
        shows_thinking: bool,
        most_calls: int | None,
    ) -> None:
        self.index = index
        self.message: dict[str, Any] = {"role": "assistant", "content": ""}
        self.logprobs: list[dict[str, Any]] = []
        self.is_full = False
        self._reader, self._id_prefix, self._is_legacy = reader, id_prefix, is_legacy
        self._shows_thinking, self._most_calls = shows_thinking, most_calls
        self._calls = 0

    def add(self, piece: Piece | None) -> list[dict[str, Any]]:
        """Add a piece, or the end of the answer, and return the deltas that it makes."""
        if piece is not None:
            self.logprobs += map(logprob_of, piece.logprobs)
        events = self._reader.close() if piece is None else self._reader.feed(piece.text)
        return list(self._deltas(events))

    def finish_reason(self, reason: FinishReason | None) -> str:
        """Return OpenAI's word for why the answer ended."""
        if self._calls and (self.is_full or reason == "stop"):
            return "function_call" if self._is_legacy else "tool_calls"
        return _REASONS[reason or "stop"]

    @property
    def calls(self) -> list[dict[str, Any]]:
        """Return the functions that are called, with their arguments."""
        if self._is_legacy:
            return [self.message["function_call"]] if self._calls else []
        return [call["function"] for call in self.message.get("tool_calls", ())]

    def whole(self, reason: FinishReason | None) -> dict[str, Any]:
        """Return the finished answer as a choice."""
        if self._calls and not self.message["content"]:
            self.message["content"] = None
        return {"index": self.index, "message": self.message, **self.ending(reason)}

    def ending(self, reason: FinishReason | None) -> dict[str, Any]:
        """Return why the answer ended."""
        return ending_of(self.finish_reason(reason), reason)

    def _deltas(self, events: list[Event]) -> Iterator[dict[str, Any]]:
        for event in events:
            if isinstance(event, CallStart) and self._calls == self._most_calls:
                self.is_full = True
            if self.is_full:
                return
            if isinstance(event, Content):
                self.message["content"] += event.text
                yield {"content": event.text}
            elif isinstance(event, Thinking):
                if self._shows_thinking:
                    self.message["reasoning_content"] = self.message.get("reasoning_content", "") + event.text
                    yield {"reasoning_content": event.text}
            elif isinstance(event, CallStart):
                yield self._start_call(event.name)
            else:
                yield self._add_arguments(event.text)

    def _start_call(self, name: str) -> dict[str, Any]:
        self._calls += 1
        function = {"name": name, "arguments": ""}
        if self._is_legacy:
            self.message["function_call"] = function
            return {"function_call": dict(function)}
        call = {"id": f"call_{self._id_prefix}{self.index}{self._calls:02}", "type": "function"}
        self.message.setdefault("tool_calls", []).append({**call, "function": function})
        return {"tool_calls": [{"index": self._calls - 1, **call, "function": dict(function)}]}

    def _add_arguments(self, text: str) -> dict[str, Any]:
        if self._is_legacy:
            self.message["function_call"]["arguments"] += text
            return {"function_call": {"arguments": text}}
        self.message["tool_calls"][-1]["function"]["arguments"] += text
        return {"tool_calls": [{"index": self._calls - 1, "function": {"arguments": text}}]}

    def take_logprobs(self) -> dict[str, Any] | None:
        """Return the tokens since the last call of this method in OpenAI's form."""
        taken, self.logprobs = self.logprobs, []
        return {"content": taken, "refusal": None} if taken else None


def logprob_of(token: TokenLogprob, with_top: bool = True) -> dict[str, Any]:
    """Return a token in OpenAI's form."""
    written: dict[str, Any] = {"token": token.text, "logprob": token.logprob, "bytes": list(token.bytes)}
    if with_top:
        written["top_logprobs"] = [logprob_of(other, with_top=False) for other in token.top]
    return written
