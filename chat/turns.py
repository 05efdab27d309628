"""The words of a conversation: turns as a person or a model says them, before any family's way of writing them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

Tool = dict[str, Any]
"""The description of a function as the data gives it: OpenAI's ``{"type": "function", "function": {...}}``, the inner
object alone, or Qwen v1's own keys (``name_for_model``, ``description_for_model``...)."""


class ToolCall(NamedTuple):
    """A call of a function. ``arguments`` is any JSON value; a string is the arguments' text as it stands."""

    name: str
    arguments: Any

    @property
    def arguments_text(self) -> str:
        return self.arguments if isinstance(self.arguments, str) else json.dumps(self.arguments, ensure_ascii=False)


class Turn(NamedTuple):
    """One message.

    Attributes:
        role: ``system``, ``user``, ``assistant`` or ``tool`` (what a called function gave back).
        content: its text; beside ``calls`` it may be empty.
        calls: functions that an assistant turn calls. The ``tool`` turns behind it are their results in this order.
        weight: how much each of its tokens counts in the loss, whatever the label mask says; 0 does not train it.
            ``None`` leaves it to the mask.
        thinking: what the assistant thought before it answered, where the data keeps it apart. Empty says that it did
            not think; ``None`` says nothing, and the text may hold ``<think>...</think>``.
    """

    role: str
    content: str
    calls: tuple[ToolCall, ...] = ()
    weight: float | None = None
    thinking: str | None = None


class Piece(NamedTuple):
    """Part of a message that has one author. Its ``weight`` 0 is not trained."""

    text: str
    role: str
    weight: float


class Message(NamedTuple):
    """A turn as it is written between ``<|im_start|>`` and ``<|im_end|>``.

    Attributes:
        role: as written in the header.
        pieces: its content; at least one, and tokenised apart.
        end: how many turns of the conversation are written when this message is.
        is_open: whether its author was not done: a call waits for its result.
    """

    role: str
    pieces: tuple[Piece, ...]
    end: int
    is_open: bool = False


class ToolForm(Protocol):
    """How a family writes tools, their calls and results."""

    def describe(self, turns: Sequence[Turn], tools: Sequence[Tool]) -> list[Turn]:
        """The turns with the tools in their system turn, where that is the place for them."""

    def calls_text(self, calls: Sequence[ToolCall]) -> str:
        """What stands behind the text of an answer that makes calls, where that is the place for them."""

    def write(
        self, turns: Sequence[Turn], weights: Sequence[float], tools: Sequence[Tool], is_prompt: bool = False
    ) -> list[Message]:
        """Turns as messages, with ``describe`` and ``calls_text`` applied; raises ``ValueError`` for what cannot be
        written. ``weights`` are the turns' own; ``is_prompt``: the model is to go on."""
