"""The text of an answer while its tokens come: whole characters, and stop texts that cross the borders of tokens."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any


class TokenBytes:
    """The bytes that each id of a byte-level tokenizer stands for.

    Special tokens have none in an answer: they are left out of its text, as ``skip_special_tokens`` does.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._added = {id_: str(token) for id_, token in added.items()}
        self._special = {id_ for id_, token in added.items() if token.special} | set(tokenizer.all_special_ids)
        self._special |= set(getattr(tokenizer, "special_tokens", {}).values())  # Qwen v1
        self._known: dict[int, bytes] = {}
        self._bytes = _byte_of_character()

    def of_answer(self, id_: int) -> bytes:
        """Return what a token adds to an answer."""
        return b"" if id_ in self._special else self.of(id_)

    def of(self, id_: int) -> bytes:
        """Return the bytes of any token; those of a special token are its name, an id without a token has none."""
        known = self._known.get(id_)
        if known is None:
            known = self._known[id_] = self._find(id_)
        return known

    def _find(self, id_: int) -> bytes:
        if id_ in self._added:
            return self._added[id_].encode()
        try:
            token = self._tokenizer.convert_ids_to_tokens(id_)
        except (LookupError, ValueError):  # rows of the head beyond the vocabulary
            return b""
        if isinstance(token, bytes):  # Qwen v1
            return token
        if id_ in self._special:
            return str(token).encode()
        try:
            return bytes(self._bytes[character] for character in token or "")
        except KeyError:  # a token that was added to the vocabulary
            return str(token).encode()


def _byte_of_character() -> dict[str, int]:
    """Return the byte of each character with which byte-level vocabularies write one.

    Printable characters of Latin-1 stand for themselves, the other bytes for the characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


class TextStream:
    """The text of one answer.

    Args:
        stops: texts that end it. What may be the beginning of one is held back.

    Attributes:
        is_stopped: a stop text was found; what follows is ignored.
    """

    def __init__(self, token_bytes: TokenBytes, stops: Sequence[str] = ()) -> None:
        self._token_bytes, self._stops = token_bytes, tuple(stops)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.is_stopped = False

    def feed(self, id_: int) -> str:
        """Return the text that is certain after the next token."""
        return self._add(self._decoder.decode(self._token_bytes.of_answer(id_)))

    def close(self) -> str:
        """Return the rest, after the last token: an incomplete character is U+FFFD."""
        text = self._add(self._decoder.decode(b"", final=True))
        text, self._held = text + self._held, ""
        return text

    def _add(self, text: str) -> str:
        if self.is_stopped:
            return ""
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:  # the one that was complete first
            self.is_stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = max((_begun(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _begun(text: str, stop: str) -> int:
    """Return the length of the longest end of a text that is a beginning of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if stop.startswith(text[-length:])), 0)
