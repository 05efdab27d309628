"""The same ids as a tokenizer of the tokenizers library gives, several times as fast, by tiktoken.

A tokenizer of byte pairs is its vocabulary, its merges and the pattern that splits texts. tiktoken always merges the
pair whose token has the lowest id. These are the same merges if ids increase with the merges, every token is made by
one merge, and the merges of a token's own text end in that token: then no other pair can ever make it. All of this
is checked; a tokenizer that is built in another way, and a text with a token that was added to the vocabulary, are left
to the tokenizers library.
"""

from __future__ import annotations

import json
import re
from typing import Any

from chat.render import EncodeText
from data_utils.special_tokens import any_of

# The patterns of GPT-2, which is the default of the library, and of Qwen. Both libraries split all characters alike
# by them; others are not tried.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tiktoken tries the end of both patterns with backtracking: white space that other white space follows. In a text
# without such white space ids are the same without this end, in half the time.
_SPACE_END = r"|\s+(?!\S)|\s+"
_QUICK_SPACE_END = r"|\s+"
# Two white-space characters in a row that this end can match, by whether the text is ASCII.
_SPACES_IN_A_ROW = {
    GPT2_PATTERN: {True: re.compile(r"[\t-\r ][\t-\r ]"), False: re.compile(r"\s\s")},
    QWEN_PATTERN: {True: re.compile(r"[\t\v\f ][\t\v\f ]"), False: re.compile(r"[^\S\r\n][^\S\r\n]")},
}
_NO_OPTIONS = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
_NO_ID = 1 << 30
# tiktoken crashes on a million spaces in a row.
_MOST_SPACES = 900_000
_SPACES = re.compile(r"[^\S\r\n]+")
# Texts until the vocabulary is converted, which takes as long as the library's encoding of some thousands.
_TEXTS_BEFORE = 4000


class FasterEncoder:
    """Encodes texts with the results of ``encode_text``, which encodes them as ``tokenizer`` does.

    Args:
        texts_before: number of texts that are still encoded with ``encode_text``.
    """

    def __init__(self, tokenizer: Any, encode_text: EncodeText, texts_before: int = _TEXTS_BEFORE) -> None:
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._slow = self._encode = encode_text
        self._left = texts_before

    def __call__(self, text: str) -> list[int]:
        if self._backend is not None:
            if self._left == 0:
                self.convert()
            self._left -= 1
        return self._encode(text)

    def convert(self) -> None:
        """Use tiktoken from now on, if it gives the same ids."""
        if self._backend is not None:
            self._encode = _by_tiktoken(self._backend, self._slow) or self._slow
            self._backend = None


def _by_tiktoken(backend: Any, encode_text: EncodeText) -> EncodeText | None:
    """Return the encoder, or ``None`` if the tokenizer is built in another way."""
    pattern, normalizer = _pattern(_state(backend.pre_tokenizer)), _state(backend.normalizer)
    if pattern is None or normalizer not in ({}, {"type": "NFC"}):  # before the vocabulary, which is large
        return None
    stated = json.loads(backend.to_str())
    if (ranks := _ranks(stated["model"], backend.model)) is None:
        return None
    normalize = backend.normalizer.normalize_str if normalizer else None
    added = any_of(token["content"] for token in stated["added_tokens"] if not token["special"])
    missing = [byte for byte in range(256) if ranks[bytes([byte])] >= _NO_ID]
    missing_ascii = any_of(chr(byte) for byte in missing if byte < 128)
    quick, exact = (_encoder(each, ranks) for each in (pattern.removesuffix(_SPACE_END) + _QUICK_SPACE_END, pattern))
    spaces_in_a_row = _SPACES_IN_A_ROW[pattern]

    def encode(text: str) -> list[int]:
        if (added is not None and added.search(text)) or _has_many_spaces(text):
            return encode_text(text)
        if (is_ascii := text.isascii()) and missing_ascii is not None and missing_ascii.search(text):
            return encode_text(text)
        if normalize is not None and not is_ascii:
            try:
                normal = normalize(text)
            except UnicodeEncodeError:  # a lone surrogate
                return encode_text(text)
            if added is not None and normal != text and added.search(normal):
                return encode_text(text)
            text, is_ascii = normal, normal.isascii()
        ids = exact(text) if spaces_in_a_row[is_ascii].search(text) else quick(text)
        return encode_text(text) if missing and not is_ascii and max(ids, default=0) >= _NO_ID else ids

    return encode


def _encoder(pattern: str, ranks: dict[bytes, int]) -> EncodeText:
    import tiktoken

    return tiktoken.Encoding("converted", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}).encode_ordinary


def _has_many_spaces(text: str) -> bool:
    return len(text) >= _MOST_SPACES and any(run.end() - run.start() >= _MOST_SPACES for run in _SPACES.finditer(text))


def _state(part: Any) -> dict[str, Any]:
    """Return what a part of a tokenizer states, as in its file; empty if the tokenizer lacks it."""
    state: dict[str, Any] = {} if part is None else json.loads(part.__getstate__())
    return state


def _pattern(step: dict[str, Any]) -> str | None:
    """Return the pattern by which a tokenizer splits texts, if it is a known one.

    Args:
        step: the state of its ``pre_tokenizer``.
    """
    first: dict[str, Any] = {}
    if step.get("type") == "Sequence" and len(step["pretokenizers"]) == 2:
        first, step = step["pretokenizers"]
    if step.get("type") != "ByteLevel" or step["add_prefix_space"]:
        return None
    if not first:
        return GPT2_PATTERN if step.get("use_regex", True) else None
    splits = {"type": "Split", "pattern": {"Regex": QWEN_PATTERN}, "behavior": "Isolated", "invert": False}
    return QWEN_PATTERN if first == splits and not step.get("use_regex", True) else None


def _ranks(stated: dict[str, Any], model: Any) -> dict[bytes, int] | None:
    """Return the id of every byte and of every token that a merge makes, if tiktoken's merges would be the same.

    Bytes that the vocabulary lacks have ids from ``_NO_ID`` on.
    """
    if stated["type"] != "BPE" or any(stated.get(name) for name in _NO_OPTIONS):
        return None
    vocabulary, tokenize, byte_of = stated["vocab"], model.tokenize, _bytes_by_character()
    ranks = {bytes([byte]): vocabulary.get(character, _NO_ID + byte) for character, byte in byte_of.items()}
    as_bytes = str.maketrans(byte_of)
    last = -1
    for merge in stated["merges"]:
        token = merge.replace(" ", "") if isinstance(merge, str) else "".join(merge)
        id_ = vocabulary.get(token, -1)
        if id_ <= last or len(made := tokenize(token)) != 1 or made[0].id != id_:
            return None
        ranks[token.translate(as_bytes).encode("latin-1")] = last = id_
    return ranks


def _bytes_by_character() -> dict[str, int]:
    """Return the byte that each character of a vocabulary stands for: itself if it is printable, else from 256 on."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + index): byte for index, byte in enumerate(others)}
