"""What a conversion to another format cannot carry over, so that it can be said."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from chat.turns import ToolCall
from data_utils.formats import Format, Record
from data_utils.formats.turns import arguments_value
from data_utils.schema import Conversation, InvalidRecord, check_json, is_empty, shown

# What the formats read of a turn, and of what lies within.
_LEAF: dict[str, Any] = {}
_CALL = {"name": _LEAF, "arguments": _LEAF}
_CALLS = {**_CALL, "id": _LEAF, "type": _LEAF, "function": _CALL}
_SHARED = {name: _LEAF for name in ("train", "loss", "weight", "reasoning_content", "reasoning", "thinking")}
_READ_OF_TURNS: dict[str, dict[str, Any]] = {
    "conversations": {"from": _LEAF, "value": _LEAF, **_SHARED},
    "messages": {
        "role": _LEAF,
        "content": {"type": _LEAF, "text": _LEAF},
        "tool_calls": _CALLS,
        "function_call": _CALL,
        "tool_call_id": _LEAF,
        **_SHARED,
    },
}


def other_fields(record: Record, source: Format, target: Format) -> Record:
    """The fields of a record that its format does not read, as far as the target and JSON can hold them."""
    taken = {*source.fields(record), *target.fields(record)}
    return {name: value for name, value in record.items() if name not in taken and _is_json(value)}


def _is_json(value: object) -> bool:
    try:
        check_json(value, "field")
    except InvalidRecord:
        return False
    return True


def losses_of(record: Record, conversation: Conversation, source: Format, target: Format) -> Iterator[str]:
    """What of a record is not in its converted form, or not as it was, each kind once.

    Args:
        conversation: what ``source`` reads in the record.
    """
    said = {*source.fields(record), *other_fields(record, source, target)}
    for name, value in record.items():
        if name not in said and not is_empty(value):
            yield f"the field {shown(name)} is not kept"
    for name in dict.fromkeys(_unread_of_turns(record, source)):
        yield f"the field {shown(name)} of turns is not kept"
    called = [turn for turn in conversation.turns if turn.calls]
    calls = [call for turn in called for call in turn.calls]
    if target.name == "conversations" and any(turn.content for turn in called):
        yield "text beside calls of functions is a turn of its own now"
    if source.name == "messages" and _has_ids(record):
        yield "ids of calls are not kept" if target.name == "conversations" else "ids of calls are numbered anew"
    if source.name == "conversations" and any(_becomes_text(call, target) for call in calls):
        yield "arguments that are a JSON string are read as the text of arguments"


def _becomes_text(call: ToolCall, target: Format) -> bool:
    """Whether arguments that are a string no longer are one, or cannot be told from the text of others."""
    return isinstance(call.arguments, str) and (
        target.name != "conversations" or not isinstance(arguments_value(call), str)
    )


def _entries(record: Record) -> list[Record]:
    names = ("conversations", "messages")
    return next((record[name] for name in names if isinstance(record.get(name), list)), [])


def _has_ids(record: Record) -> bool:
    return any(call.get("id") for entry in _entries(record) for call in entry.get("tool_calls") or [])


def _unread_of_turns(record: Record, source: Format) -> Iterator[str]:
    read = _READ_OF_TURNS.get(source.name)
    if read is None:
        return
    entries = _entries(record)
    yield from _unread(entries, read)
    if source.name == "conversations":
        calls = [json.loads(entry["value"]) for entry in entries if entry["from"] == "function_call"]
        yield from _unread(calls, _CALLS)


def _unread(value: object, read: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Names of fields that hold something and are not in ``read``, which says so for each field it names as well."""
    if isinstance(value, list):
        for item in value:
            yield from _unread(item, read, path)
    elif isinstance(value, dict) and read:
        for name, item in value.items():
            if name in read:
                yield from _unread(item, read[name], f"{path}{name}.")
            elif not is_empty(item):
                yield path + name
