"""ReAct text, as ``chat.tools_react`` writes it, read while it comes in pieces.

The results are those of the API server of Qwen v1: a thought is the content of the message that makes a call, and is
not part of a final answer. A thought is held back until one of them follows it. What the server took back when a
second final answer came cannot be taken back here, because it has been sent.
"""

from __future__ import annotations

import re
from typing import Literal

from chat.events import CallArguments, CallStart, Content, Event, Thinking, partial_length

_THOUGHT, _ACTION, _INPUT, _OBSERVATION = "Thought:", "\nAction:", "\nAction Input:", "\nObservation:"
_CALL = re.compile(r"\nAction:[^\S\n]*(\S[^\n]*)\nAction Input:")
_FINAL = re.compile(r"\nFinal Answer:")
_CONCLUSIONS = ("I now know the final answer", "I now know the final answer.")


class ReactText:
    """Reads a thought with a call, a final answer, or text without either.

    Args:
        opening: the start of the answer if it is part of the prompt; fed like the rest, but not content.
    """

    def __init__(self, opening: str = "") -> None:
        self._opening = opening
        self._held = ""
        self._state: Literal["start", "thought", "text", "arguments", "answer", "ended"] = "start"
        self._is_first = True  # nothing of the arguments or the final answer has come

    def feed(self, text: str) -> list[Event]:
        self._held += text
        events: list[Event] = []
        if self._state == "start":
            self._start()
        if self._state in ("thought", "text"):
            events += self._read_thought()
        if self._state == "arguments":
            events += self._read_arguments()
        elif self._state == "answer":
            events += self._read_answer()
        return events

    def close(self) -> list[Event]:
        text, self._held = self._held, ""
        if self._state == "ended":
            return []
        if self._state == "arguments":
            return self._arguments(text.strip() if self._is_first else text.rstrip())
        return _content(text.removeprefix(self._opening))

    def _start(self) -> None:
        text = self._held.lstrip()
        if text.startswith(_THOUGHT):
            self._state = "thought"
        elif not _THOUGHT.startswith(text):
            self._state = "text"

    def _read_thought(self) -> list[Event]:
        """Return what precedes a call or a final answer, and the start of the call."""
        call = _CALL.search(self._held)
        final = _FINAL.search(self._held) if self._state == "thought" else None
        found = min(filter(None, (call, final)), key=lambda match: match.start(), default=None)
        if found is None:
            return self._release_text()
        before = self._held[: found.start()].strip()
        if self._state == "thought":
            before = before.removeprefix(_THOUGHT).strip()
        self._held = self._held[found.end() :]
        if found is call:
            self._state = "arguments"
            return [*_content(before), CallStart(found.group(1).strip())]
        self._state = "answer"
        return [Thinking(before)] if before and before not in _CONCLUSIONS else []

    def _release_text(self) -> list[Event]:
        """Return the text that cannot belong to a call."""
        if self._state == "thought":
            return []
        text = self._held[: _possible_call(self._held)].rstrip()
        self._held = self._held[len(text) :]
        return _content(text)

    def _read_arguments(self) -> list[Event]:
        text, tag, _ = self._held.partition(_OBSERVATION)
        if tag:
            self._state = "ended"
        else:
            text = text[: len(text) - partial_length(text, _OBSERVATION)]
        self._held = self._held[len(text.rstrip()) :]
        return self._arguments(text.strip() if self._is_first else text.rstrip())

    def _arguments(self, text: str) -> list[Event]:
        self._is_first = self._is_first and not text
        return [CallArguments(text)] if text else []

    def _read_answer(self) -> list[Event]:
        text, self._held = self._held, ""
        if text and self._is_first:
            self._is_first = False
            text = text.removeprefix(" ")
        return _content(text)


def _content(text: str) -> list[Event]:
    return [Content(text)] if text else []


def _possible_call(text: str) -> int:
    """Return the position at the end of a text from which on it may become a call; its length if there is none."""
    start = text.rfind("\n")
    if start < 0:
        return len(text)
    line, before = text[start:], text.rfind("\n", 0, start)
    if before >= 0 and text.startswith(_ACTION, before) and _INPUT.startswith(line):
        return before
    return start if line.startswith(_ACTION) or _ACTION.startswith(line) else len(text)
