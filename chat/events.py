"""The parts of an answer, in the order in which they arrive."""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Content(NamedTuple):
    """Text for the user."""

    text: str


class Thinking(NamedTuple):
    """Reasoning that precedes the answer."""

    text: str


class CallStart(NamedTuple):
    """Start of a function call; ``CallArguments`` follow."""

    name: str


class CallArguments(NamedTuple):
    """Part of the arguments' text of the last call that started."""

    text: str


Event = Content | Thinking | CallStart | CallArguments


class EventReader(Protocol):
    """A parser of text that comes in pieces. How the text is split does not change the joined events."""

    def feed(self, text: str) -> list[Event]:
        """Return the events that the next piece of text completes."""

    def close(self) -> list[Event]:
        """Return the events of the text that was held back: nothing follows it."""


class PlainReader:
    """Reads everything as content."""

    def feed(self, text: str) -> list[Event]:
        return [Content(text)] if text else []

    def close(self) -> list[Event]:
        return []


def partial_length(text: str, tag: str) -> int:
    """Return how many characters at the end of a text may be the start of ``tag``."""
    lengths = range(min(len(text), len(tag) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(tag[:length])), 0)
