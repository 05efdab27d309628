"""The texts of a conversation that reach its ids."""

from __future__ import annotations

import json

from chat.turns import Turn
from data_utils.schema import Conversation


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
