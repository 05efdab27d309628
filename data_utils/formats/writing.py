"""Write conversations as records of the formats ``conversations`` and ``messages``."""

from __future__ import annotations

import json
from typing import Any

from chat.turns import ToolCall, Turn
from data_utils.formats.json_text import parse_json, without_nulls
from data_utils.formats.turns import FUNCTION_CALL
from data_utils.schema import Conversation, InvalidRecord, Record

THINKING_FIELD = "reasoning_content"
"""The field of an answer that its thinking is written to."""


def write_conversations(conversation: Conversation, extra: Record) -> Record:
    """Return a record that ``parse_conversations`` parses to the same conversation, with one exception.

    The text of a turn with calls becomes a turn before them, which also takes the turn's reasoning. Arguments that are
    JSON text are decoded if encoding gives the same text again.

    Args:
        extra: other fields of the record.
    """
    entries = []
    for turn in conversation.turns:
        weight, thinking = _weight_fields(turn), _thinking_fields(turn)
        if turn.content or not turn.calls:
            author = "observation" if turn.role == "tool" else turn.role
            entries.append({"from": author, "value": turn.content, **thinking, **weight})
            thinking = {}
        if turn.calls:
            calls = [{"name": call.name, "arguments": arguments_value(call)} for call in turn.calls]
            value = json.dumps(calls[0] if len(calls) == 1 else calls, ensure_ascii=False)
            entries.append({"from": FUNCTION_CALL, "value": value, **thinking, **weight})
    tools = {"tools": json.dumps(conversation.tools, ensure_ascii=False)} if conversation.tools else {}
    return {**extra, "conversations": entries, **tools}


def arguments_value(call: ToolCall) -> Any:
    """Return the arguments of a call as ``conversations`` writes them."""
    if not isinstance(call.arguments, str):
        return call.arguments
    try:
        value = parse_json(call.arguments, "arguments")
    except InvalidRecord:
        return call.arguments
    # When parsed again, a string would be read as the text of the arguments, and null as no arguments.
    if value is None or isinstance(value, str) or json.dumps(value, ensure_ascii=False) != call.arguments:
        return call.arguments
    return value


def write_messages(conversation: Conversation, extra: Record) -> Record:
    """Return a record that ``parse_messages`` parses to the same conversation, with arguments of calls as JSON text.

    Args:
        extra: other fields of the record.
    """
    messages: list[Record] = []
    count = 0
    open_ids: list[str] = []  # of the last calls, without those whose result is written
    for turn in conversation.turns:
        message: Record = {"role": turn.role, "content": turn.content}
        if turn.calls:
            open_ids = [f"call_{number}" for number in range(count + 1, count + len(turn.calls) + 1)]
            count += len(turn.calls)
            message["tool_calls"] = [
                {"id": id_, "type": "function", "function": {"name": call.name, "arguments": call.arguments_text}}
                for id_, call in zip(open_ids, turn.calls, strict=True)
            ]
        elif turn.role == "tool":
            message["tool_call_id"] = open_ids.pop(0)
        messages.append({**message, **_thinking_fields(turn), **_weight_fields(turn)})
    return {**extra, "messages": messages, **_tools_field(conversation)}


def _tools_field(conversation: Conversation) -> Record:
    """Return the tools as a list; as JSON text if they have null fields, which are not read from a list."""
    tools = list(conversation.tools)
    if not tools:
        return {}
    return {"tools": tools if without_nulls(tools) == tools else json.dumps(tools, ensure_ascii=False)}


def _thinking_fields(turn: Turn) -> Record:
    return {} if turn.thinking is None else {THINKING_FIELD: turn.thinking}


def _weight_fields(turn: Turn) -> Record:
    if turn.weight is None:
        return {}
    return {"train": bool(turn.weight)} if turn.weight in (0.0, 1.0) else {"weight": turn.weight}
