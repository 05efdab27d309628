"""A rendered conversation: messages made of segments, and the interface of the tool forms that write them.

Segments rather than one string, because control tokens, authors and loss weights must never be recovered by searching
the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Protocol

from chat.events import EventReader
from chat.turns import Tool, ToolCall, Turn


class Segment(NamedTuple):
    """One control token, or a text that is tokenised on its own.

    Attributes:
        weight: loss weight of each of its ids; 0 is not trained.
        role: author of the text; for a control token, author of its message.
    """

    text: str
    is_control: bool
    weight: float
    role: str


class Message(NamedTuple):
    """A message from ``<|im_start|>`` to ``<|im_end|>``: one turn, or several (an answer with its tool results).

    Attributes:
        role: as written in the header.
        segments: at least one. A tool form gives the content; ``chat.render`` adds the header and the control tokens.
        end: number of the conversation's turns that are complete after this message.
        is_open: its author has not finished: a call waits for its result.
        trained: the trained answers in it, as the conversation has them.
    """

    role: str
    segments: list[Segment]
    end: int
    is_open: bool = False
    trained: tuple[Turn, ...] = ()

    @classmethod
    def from_turn(cls, turn: Turn, weight: float, end: int) -> Message:
        """Return the content of a message that is one turn."""
        return cls(turn.role, [Segment(turn.content, False, weight, turn.role)], end)


class ToolForm(Protocol):
    """The text of tools, calls and results in one family.

    Attributes:
        stops: strings at which an answer ends: what follows is not the model's to write.
        opening_after_result: the start of an answer after a result, which is part of the prompt.
        separator: text between an answer's words and its calls.
    """

    stops: ClassVar[tuple[str, ...]]
    opening_after_result: ClassVar[str]
    separator: ClassVar[str]

    def check(self, turns: Sequence[Turn], tools: Sequence[Tool]) -> None:
        """Check that a conversation can be written in this form.

        Raises:
            ValueError: it cannot; the message names the reason.
        """

    def lost_fields(self, tools: Sequence[Tool]) -> list[str]:
        """Return the names of fields with content that ``describe`` leaves out."""

    def describe(self, turns: Sequence[Turn], tools: Sequence[Tool]) -> list[Turn]:
        """Return the turns with the tools described in one of them."""

    def calls_text(self, calls: Sequence[ToolCall]) -> str:
        """Return the text that calls add to the end of an answer; empty if ``write`` adds them."""

    def write(self, turns: Sequence[Turn], weights: Sequence[float], is_prompt: bool = False) -> list[Message]:
        """Convert checked turns to the content of messages.

        Args:
            turns: after ``describe``; answers already contain ``calls_text``.
            weights: loss weight of each turn.
            is_prompt: the model is to continue the conversation.
        """

    def call_start(self, name: str | None) -> str:
        """Return the start of an answer that calls a function: any one, or the one with this name."""

    def reader(self, opening: str, tools: Sequence[Tool] = ()) -> EventReader:
        """Return a parser of an answer that may contain calls.

        Args:
            tools: the functions, for the types of their parameters.
            opening: the start of the answer if it is part of the prompt; the parser is fed with it like with the rest.
        """
