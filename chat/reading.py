"""Text of a model as content, thinking and calls, while it arrives: the inverse of what ``chat`` writes.

A malformed call is content. Nothing that a model writes is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from chat.events import CallStart, Content, Event, EventReader, PlainReader, Thinking, partial_length
from chat.families import THINK, THINK_END, Family
from chat.turns import Tool, ToolCall, Turn


class AnswerReader:
    """Parses an answer that comes in pieces.

    Args:
        family: of the model.
        tools: functions that were offered. Without any, what looks like a call is content.
        opening: the start of the answer if it is part of the prompt; see ``opening_of``.
    """

    def __init__(self, family: Family, tools: Sequence[Tool] = (), opening: str = "") -> None:
        form = family.tool_form if tools else None
        self._calls: EventReader = form.reader(opening, tools) if form else PlainReader()
        self._thought = _Thought(family.has_thinking)
        self._pending: list[Event] = []
        self._pending = self.feed(opening)  # of a call that the prompt has started

    def feed(self, text: str) -> list[Event]:
        """Return the events that the next piece of text completes."""
        pending, self._pending = self._pending, []
        events, rest = self._thought.feed(text)
        return [*pending, *events, *self._calls.feed(rest)]

    def close(self) -> list[Event]:
        """Return the events of the text that was held back: nothing follows it."""
        events, rest = self._thought.close()
        return [*self._pending, *events, *self._calls.feed(rest), *self._calls.close()]


class _Thought:
    """Separates the thinking that opens an answer from the rest, which is passed on."""

    def __init__(self, is_possible: bool) -> None:
        self._state: Literal["start", "thought", "gap", "rest"] = "start" if is_possible else "rest"
        self._held = ""
        self._is_first = True  # nothing of the thought has come

    def feed(self, text: str) -> tuple[list[Event], str]:
        self._held += text
        events: list[Event] = []
        if self._state == "start":
            start = self._held.lstrip()
            if start.startswith(THINK):
                self._state, self._held = "thought", start.removeprefix(THINK)
            elif not THINK.startswith(start):
                self._state = "rest"
        if self._state == "thought":
            events = self._read_thought()
        if self._state == "gap":
            self._held = self._held.lstrip("\n")
            self._state = "rest" if self._held else "gap"
        rest = ""
        if self._state == "rest":
            rest, self._held = self._held, ""
        return events, rest

    def close(self) -> tuple[list[Event], str]:
        text, self._held = self._held, ""
        return (self._thinking(text), "") if self._state == "thought" else ([], text)

    def _read_thought(self) -> list[Event]:
        text, end_tag, rest = self._held.partition(THINK_END)
        if end_tag:
            self._state, self._held = "gap", rest
            return self._thinking(text)
        # Line ends before the end tag are not part of the thought.
        text = text[: len(text) - partial_length(text, THINK_END)].rstrip("\n")
        self._held = self._held[len(text) :]
        return self._thinking(text)

    def _thinking(self, text: str) -> list[Event]:
        text = text.rstrip("\n")
        if self._is_first:
            text = text.lstrip("\n")
        self._is_first = self._is_first and not text
        return [Thinking(text)] if text else []


def opening_of(family: Family, has_tools: bool, after_result: bool) -> str:
    """Return the text of an answer that its prompt already contains.

    Args:
        after_result: the conversation ends with the result of a call.
    """
    if family.prompt_suffix:
        return family.prompt_suffix
    return family.tool_form.opening_after_result if family.tool_form and has_tools and after_result else ""


def ends_in_thinking(text: str, family: Family, opening: str = "") -> bool:
    """Return whether a whole answer begins to think and does not end that."""
    whole = (opening + text).lstrip()
    return family.has_thinking and whole.startswith(THINK) and THINK_END not in whole


def with_begun_thinking(text: str, family: Family, opening: str) -> str:
    """Return an answer with the beginning of its thinking, if the prompt contains that."""
    return f"{opening}{text}" if ends_in_thinking("", family, opening) else text


def read_answer(text: str, family: Family, tools: Sequence[Tool] = (), opening: str = "") -> Turn:
    """Parse a whole answer; see :class:`AnswerReader`."""
    reader = AnswerReader(family, tools, opening)
    return turn_of([*reader.feed(text), *reader.close()])


def turn_of(events: Iterable[Event]) -> Turn:
    """Join events to an assistant turn, the arguments of calls as text."""
    content: list[str] = []
    thinking: list[str] = []
    calls: list[ToolCall] = []
    for event in events:
        if isinstance(event, Content):
            content.append(event.text)
        elif isinstance(event, Thinking):
            thinking.append(event.text)
        elif isinstance(event, CallStart):
            calls.append(ToolCall(event.name, ""))
        else:
            calls[-1] = calls[-1]._replace(arguments=calls[-1].arguments + event.text)
    return Turn("assistant", "".join(content), tuple(calls), thinking="".join(thinking) if thinking else None)
