"""Calls between tags, as ``chat.tools_hermes`` writes them, read from a text that comes in pieces.

A call is reported when it is complete and valid, so that no client gets arguments that are not JSON. Everything else
is content, a malformed call with its tags.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from chat.arguments import refuse_constant
from chat.events import CallArguments, CallStart, Content, Event, partial_length

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_ESCAPED = re.compile(r"\\.", re.DOTALL)


class TaggedCalls:
    """Reads content and calls.

    Args:
        parse: returns the events of the text between the tags of a call; nothing if it is malformed.
        is_cut: whether such a text ends within a value, so that the end tag is part of that value.
        separator: line ends between content and the first call; fewer of them are none of the content's either.
    """

    def __init__(
        self,
        parse: Callable[[str], list[Event]] | None = None,
        is_cut: Callable[[str], bool] | None = None,
        separator: str = "\n",
    ) -> None:
        self._parse, self._is_cut = parse or _call_events, is_cut or _ends_in_string
        self._most_line_ends = len(separator)
        self._openings = [separator[start:] + _OPEN for start in range(len(separator) + 1)]
        self._held = ""
        self._gap: str | None = None  # what preceded the tag of the call that is being read; None outside calls
        self._searched = 0  # characters of a call in which its end is not
        self._has_content = self._has_call = False

    def feed(self, text: str) -> list[Event]:
        self._held += text
        events: list[Event] = []
        while (found := self._read_call() if self._gap is not None else self._read_text()) is not None:
            events += found
        return events + self._release()

    def close(self) -> list[Event]:
        text, self._held = self._held, ""
        if self._gap is not None:
            return self._parse(text) or _content(f"{self._gap}{_OPEN}{text}")
        return [] if self._has_call and not self._has_content and text.isspace() else _content(text)

    def _read_text(self) -> list[Event] | None:
        """Return the content before the next call; ``None`` if no call has started."""
        before, tag, after = self._held.partition(_OPEN)
        if not tag:
            return None
        line_ends = min(len(before) - len(before.rstrip("\n")), self._most_line_ends)
        text = "" if not self._has_content and not before.strip() else before[: len(before) - line_ends]
        self._gap, self._held, self._searched = before[len(text) :], after, 0
        return _content(text)

    def _read_call(self) -> list[Event] | None:
        """Return the events of the call that is being read; ``None`` if its end has not come."""
        end = self._held.find(_CLOSE, max(0, self._searched - len(_CLOSE)))
        if end < 0:
            self._searched = len(self._held)
            return None
        body, rest = self._held[:end], self._held[end + len(_CLOSE) :]
        events = self._parse(body)
        if not events and self._is_cut(body):
            self._searched = end + 2 * len(_CLOSE)
            return []
        self._has_call, self._has_content = self._has_call or bool(events), not events
        if not events:
            events = _content(f"{self._gap}{_OPEN}{body}{_CLOSE}")
        self._gap, self._held = None, rest
        return events

    def _release(self) -> list[Event]:
        """Return the content that cannot belong to a call."""
        if self._gap is not None:
            return []
        kept = max(partial_length(self._held, opening) for opening in self._openings)
        text = self._held[: len(self._held) - kept]
        if not self._has_content and not text.strip():
            return []
        self._has_content, self._held = True, self._held[len(text) :]
        return _content(text)


def _content(text: str) -> list[Event]:
    return [Content(text)] if text else []


def _call_events(body: str) -> list[Event]:
    """Return the events of a call; nothing if it is malformed."""
    try:
        call: Any = json.loads(body, strict=False, parse_constant=refuse_constant)
        name, arguments = call["name"], call.get("arguments", {})
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        f"{name}{text}".encode()  # escapes of half a character
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return []
    return [CallStart(name), CallArguments(text)] if isinstance(name, str) and name else []


def _ends_in_string(body: str) -> bool:
    """Check that a text ends inside a JSON string: a tag there is part of an argument."""
    return _ESCAPED.sub("", body).count('"') % 2 == 1
