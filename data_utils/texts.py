"""The texts of a conversation that reach its ids."""

from __future__ import annotations

import json

from chat.turns import Turn
from data_utils.location import Location
from data_utils.schema import Conversation
from errors import DataError


def texts_of(conversation: Conversation) -> list[str]:
    """Return the texts of a conversation that reach its ids."""
    texts: list[str] = []
    for turn in conversation.turns:
        texts += texts_of_turn(turn)
    return texts + [json.dumps(tool, ensure_ascii=False) for tool in conversation.tools]


def texts_of_turn(turn: Turn) -> list[str]:
    """Return the texts of a turn."""
    if not turn.calls and not turn.thinking:
        return [turn.content]
    calls = [text for call in turn.calls for text in (call.name, call.arguments_text)]
    return [turn.content, turn.thinking or "", *calls]


def check_characters(text: str, owner: str, where: Location | str) -> None:
    """Raise ``DataError`` for half of a surrogate pair, which JSON can write but which has no tokens."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        what = f"{owner} contains {text[error.start]!r}, half of a surrogate pair, which is no character"
        raise DataError(where, what, "Write the whole character, or leave the record out") from None
