"""A conversation as its data gives it, before any chat format is applied."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

Tool = dict[str, Any]
"""Description of a function: OpenAI's ``{"type": "function", "function": {...}}``, its inner object alone, or Qwen v1's
own keys (``name_for_model``, ``description_for_model``...)."""


TEXT = "text"
"""Role of the only turn of a plain text, which belongs to no conversation and is written without a chat format."""


class ToolCall(NamedTuple):
    """A function call. ``arguments`` is any JSON value; a string is the arguments' text, used verbatim."""

    name: str
    arguments: Any

    @property
    def arguments_text(self) -> str:
        return self.arguments if isinstance(self.arguments, str) else json.dumps(self.arguments, ensure_ascii=False)


class Turn(NamedTuple):
    """One message.

    Attributes:
        role: ``system``, ``user``, ``assistant``, ``tool`` (the result of a call) or ``TEXT``.
        content: its text; may be empty if there are ``calls``.
        calls: function calls of an assistant turn. The ``tool`` turns after it are their results, in this order.
        weight: loss weight of each of its tokens, overriding the label mask; 0 does not train it. ``None`` leaves the
            decision to the mask.
        thinking: the assistant's reasoning, if the data keeps it in a field of its own. Empty: there was none.
            ``None``: unknown, and the text may contain ``<think>...</think>``.
    """

    role: str
    content: str
    calls: tuple[ToolCall, ...] = ()
    weight: float | None = None
    thinking: str | None = None
