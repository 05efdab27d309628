"""Special tokens in the text of messages: plain text, except for those that ``--allow_special_tokens`` names.

The control tokens of the chat format are never among them: only rendering places those.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from chat.chatml import END_OF_TEXT, IM_END, IM_START
from chat.render import EncodeText
from errors import ConfigError

_FLAG = "--allow_special_tokens"
_CONTROL_TOKENS = (IM_START, IM_END, END_OF_TEXT)
_SHOWN_NAMES = 8


class SpecialTokens(NamedTuple):
    """The tokens of a tokenizer that are no part of its plain vocabulary, with their ids.

    Attributes:
        allowed: tokens that text becomes.
        plain: special tokens that stay text.
    """

    allowed: Mapping[str, int]
    plain: Mapping[str, int]


def find_special_tokens(tokenizer: Any, names: Collection[str], control: Collection[str] = ()) -> SpecialTokens:
    """Return the special tokens of a tokenizer, without the control tokens.

    Args:
        names: those that are allowed.
        control: control tokens of the chat format beside ChatML's.

    Raises:
        ConfigError: a name that is no added token, or a control token.
    """
    control_tokens = (*_CONTROL_TOKENS, *control)
    control_ids = {int(tokenizer.convert_tokens_to_ids(token)) for token in control_tokens if _has(tokenizer, token)}
    control_ids |= {id_ for name in ("eos", "pad") if (id_ := getattr(tokenizer, f"{name}_token_id", None)) is not None}
    added = _added_tokens(tokenizer)
    known = {text: id_ for text, (id_, _) in added.items() if id_ not in control_ids and text not in control_tokens}
    for name in names:
        if name in known:
            continue
        if name in added or name in control_tokens:
            raise ConfigError(f"{_FLAG} {name}: text must never become a control token of the chat format", "Remove it")
        shown = ", ".join(list(known)[:_SHOWN_NAMES]) + (", ..." if len(known) > _SHOWN_NAMES else "")
        fix = f"Its tokens are {shown}" if known else "It has none: add the token to the checkpoint's tokenizer first"
        raise ConfigError(f"{_FLAG} {name}: the tokenizer has no such special token", fix)
    plain = {text: id_ for text, id_ in known.items() if added[text][1] and text not in names}
    return SpecialTokens({name: known[name] for name in names}, plain)


def _has(tokenizer: Any, token: str) -> bool:
    return tokenizer.convert_tokens_to_ids(token) is not None


def _added_tokens(tokenizer: Any) -> dict[str, tuple[int, bool]]:
    """Return text -> id, and whether it is special: the text of other added tokens always becomes the token."""
    if isinstance(tokens := getattr(tokenizer, "special_tokens", None), dict):  # Qwen v1
        return {text: (id_, True) for text, id_ in tokens.items()}
    decoder = getattr(tokenizer, "added_tokens_decoder", {})
    return {str(token): (int(id_), bool(token.special)) for id_, token in decoder.items()}


def any_of(tokens: Iterable[str]) -> re.Pattern[str] | None:
    """Return a pattern that finds the tokens, the longest first; ``None`` without tokens."""
    ordered = sorted((token for token in tokens if token), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def encoder_with(encode_text: EncodeText, allowed: Mapping[str, int], others: Collection[str] = ()) -> EncodeText:
    """Return a function that encodes text as ``encode_text`` does, except for the allowed tokens.

    Args:
        others: tokens whose text stays text; no allowed token is found within it.
    """
    if not allowed:
        return encode_text
    pattern = any_of({*allowed, *others})
    assert pattern is not None

    def encode(text: str) -> list[int]:
        if pattern.search(text) is None:
            return encode_text(text)
        ids: list[int] = []
        start = 0
        for match in pattern.finditer(text):
            if (id_ := allowed.get(match[0])) is None:
                continue
            ids += encode_text(text[start : match.start()]) if match.start() > start else []
            ids.append(id_)
            start = match.end()
        return ids + encode_text(text[start:]) if start < len(text) or not ids else ids

    return encode
