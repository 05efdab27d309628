"""The same ids as a tokenizer of the tokenizers library gives, several times as fast, by tiktoken.

A tokenizer of byte pairs is its vocabulary, its merges and the pattern that splits texts. tiktoken always merges the
pair whose token has the lowest id. These are the same merges if ids increase with the merges, every token is made by
one merge, and the merges of a token's own text end in that token: then no other pair can ever make it. All of this
is checked; a tokenizer that is built in another way, and a text with a byte that the vocabulary lacks, are left to the
tokenizers library. Tokens that were added to the vocabulary, such as ``<think>``, cut a text into parts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from chat.render import EncodeText
from data_utils.special_tokens import any_of, encoder_with

# The patterns of GPT-2, which is the default of the library, of Qwen and of Qwen3.5, which keeps marks with letters.
# Both libraries split all characters alike by them; others are not tried.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN3_5_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tiktoken tries the end of these patterns with backtracking: white space that other white space follows. In a text
# without such white space ids are the same without this end, in half the time.
_SPACE_END = r"|\s+(?!\S)|\s+"
_QUICK_SPACE_END = r"|\s+"
# Two white-space characters in a row that this end can match, by whether the text is ASCII.
_NO_LINE_ENDS = {True: re.compile(r"[\t\v\f ][\t\v\f ]"), False: re.compile(r"[^\S\r\n][^\S\r\n]")}
_SPACES_IN_A_ROW = {
    GPT2_PATTERN: {True: re.compile(r"[\t-\r ][\t-\r ]"), False: re.compile(r"\s\s")},
    QWEN_PATTERN: _NO_LINE_ENDS,
    QWEN3_5_PATTERN: _NO_LINE_ENDS,
}
_NO_OPTIONS = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
# Options with which an added token takes more than its text, or is no token within a word.
_WIDER = ("single_word", "lstrip", "rstrip")
_NO_ID = 1 << 30
# tiktoken crashes on a million spaces in a row.
_MOST_SPACES = 900_000
_SPACES = re.compile(r"[^\S\r\n]+")
# Texts until the vocabulary is converted, which takes as long as the library's encoding of some thousands. A long text
# counts as several, so that one of a megabyte is not left to the library, which takes far more time and memory for it.
_TEXTS_BEFORE = 4000
_CHARACTERS_OF_A_TEXT = 256


class _Unknown(Exception):
    """A text that only the library can encode."""


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
            self._left -= 1 + len(text) // _CHARACTERS_OF_A_TEXT
            if self._left < 0:
                self.convert()
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
    added = stated["added_tokens"]
    if any(token[name] for token in added if not token["special"] for name in _WIDER):
        return None
    if (ranks := _ranks(stated["model"], backend.model)) is None:
        return None
    normalize: Callable[[str], str] | None = backend.normalizer.normalize_str if normalizer else None
    encode_normal = _cut_at_added(
        [token for token in added if token["normalized"]], _encode_normal(pattern, ranks), normalize
    )

    def encode_part(text: str) -> list[int]:
        if normalize is not None and not text.isascii():
            try:
                text = normalize(text)
            except UnicodeEncodeError:  # a lone surrogate
                raise _Unknown from None
        return encode_normal(text)

    encode_parts = _cut_at_added([token for token in added if not token["normalized"]], encode_part)

    def encode(text: str) -> list[int]:
        try:
            return encode_parts(text)
        except _Unknown:
            return encode_text(text)

    return encode


def _cut_at_added(
    tokens: Iterable[Mapping[str, Any]], encode_text: EncodeText, normalize: Callable[[str], str] | None = None
) -> EncodeText:
    """Return a function that encodes text as ``encode_text`` does, except for added tokens that are not special."""
    written = [(token["content"] if normalize is None else normalize(token["content"]), token) for token in tokens]
    ids = {content: int(token["id"]) for content, token in written if content and not token["special"]}
    return encoder_with(encode_text, ids, {content for content, _ in written})


def _encode_normal(pattern: str, ranks: dict[bytes, int]) -> EncodeText:
    """Return the encoder of normalised texts; it raises ``_Unknown``."""
    missing = [byte for byte in range(256) if ranks[bytes([byte])] >= _NO_ID]
    missing_ascii = any_of(chr(byte) for byte in missing if byte < 128)
    quick, exact = (_encoder(each, ranks) for each in (pattern.removesuffix(_SPACE_END) + _QUICK_SPACE_END, pattern))
    spaces_in_a_row = _SPACES_IN_A_ROW[pattern]

    def encode(text: str) -> list[int]:
        is_ascii = text.isascii()
        if _has_many_spaces(text) or (is_ascii and missing_ascii is not None and missing_ascii.search(text)):
            raise _Unknown
        ids = exact(text) if spaces_in_a_row[is_ascii].search(text) else quick(text)
        if missing and not is_ascii and max(ids, default=0) >= _NO_ID:
            raise _Unknown
        return ids

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
    if step.get("use_regex", True):
        return None
    for pattern in (QWEN_PATTERN, QWEN3_5_PATTERN):
        if first == {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            return pattern
    return None


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
