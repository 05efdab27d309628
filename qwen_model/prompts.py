"""Prompts as text that knows which of its parts are control tokens.

A string alone cannot say whether ``<|im_end|>`` in it is the end of a message or something that a user wrote. What
``make_context`` and ``apply_chat_template(tokenize=False)`` return can, so tokenising it gives the ids that were meant.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from chat.chatml import END_OF_TEXT, IM_END, IM_START

SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END, *(f"<|extra_{number}|>" for number in range(205)))

Segment = tuple[str, bool]
"""A text that is tokenised on its own, and whether it is a control token."""

# The header of a message is tokenised separately, as in training: a newline after it would merge with its own.
_HEADER = re.compile(r"[^<\n]*\n")
_SPECIAL = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
_FIRST_PRIVATE, _LAST_PRIVATE = 0xE000, 0xF8FF


class Prompt(str):
    """A rendered prompt. Concatenation, slices and formatting give a plain ``str``.

    Attributes:
        segments: its parts, in order.
    """

    segments: tuple[Segment, ...]

    def __new__(cls, segments: Iterable[Segment]) -> Prompt:
        parts = tuple(segments)
        self = super().__new__(cls, "".join(text for text, _ in parts))
        self.segments = parts
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:
        return (self.segments,)

    def __radd__(self, other: Any) -> Any:
        # transformers' pipelines put a prefix before the text, which is empty by default.
        return self if other == "" else NotImplemented

    @classmethod
    def parse(cls, text: str, mark: str = "") -> Prompt:
        """Read a rendered text: whatever looks like a control token is one, except where ``mark`` is inside it.

        Args:
            mark: what ``mark_special`` put into the texts of users; it is removed.
        """
        segments: list[Segment] = []
        start = 0

        def add_plain(stop: int) -> None:
            if piece := text[start:stop].replace(mark, "") if mark else text[start:stop]:
                segments.append((piece, False))

        for token in _SPECIAL.finditer(text):
            add_plain(token.start())
            segments.append((token[0], True))
            start = token.end()
            if token[0] == IM_START and (header := _HEADER.match(text, start)):
                add_plain(header.end())
                start = header.end()
        add_plain(len(text))
        return cls(segments)


def find_special(text: str) -> str | None:
    """Return the first text of a special token in a string."""
    match = _SPECIAL.search(text) if "<|" in text else None
    return match[0] if match else None


def unused_character(*values: Any) -> str:
    """Return a character of the private-use area that none of the values' texts contains."""
    text = json.dumps(values, ensure_ascii=False, default=str)
    return next(char for code in range(_FIRST_PRIVATE, _LAST_PRIVATE) if (char := chr(code)) not in text)


def mark_special(value: Any, mark: str) -> Any:
    """Return a copy of messages or tools in which ``mark`` splits every text of a special token."""
    if isinstance(value, str):
        return _SPECIAL.sub(lambda token: f"{token[0][0]}{mark}{token[0][1:]}", value)
    if isinstance(value, Mapping):
        return {key: mark_special(item, mark) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [mark_special(item, mark) for item in value]
    return value
