"""Changes to a record when it is converted to another format, for the report."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from chat.turns import ToolCall
from data_utils.formats import Format
from data_utils.formats.pairs import PAIRS
from data_utils.formats.turns import CALL_AUTHORS
from data_utils.formats.writing import arguments_value
from data_utils.schema import (
    NULLS_LEFT_OUT,
    READ_IN_TURNS,
    Conversation,
    InvalidRecord,
    Record,
    check_json,
    is_empty,
    short_repr,
)

# The fields that the formats read in a turn, and in the objects within it.
_LEAF: dict[str, Any] = {}
_CALL = {"name": _LEAF, "arguments": _LEAF}
_CALLS = {**_CALL, "id": _LEAF, "type": _LEAF, "function": _CALL}
_SHARED = dict.fromkeys(READ_IN_TURNS, _LEAF)
_FIELDS_OF_TURNS: dict[str, dict[str, Any]] = {
    "conversations": {"from": _LEAF, "value": _LEAF, **_SHARED},
    "messages": {
        "role": _LEAF,
        "content": {**dict.fromkeys(("type", "text", "value", "reasoning", "thinking"), _LEAF), **_CALL},
        "tool_calls": _CALLS,
        "function_call": _CALL,
        "tool_call_id": _LEAF,
        **_SHARED,
    },
}
_FIELDS_OF_TURNS["pairs"] = _FIELDS_OF_TURNS["messages"]


def other_fields(record: Record, source: Format, target: Format) -> Record:
    """Return the fields of a record that its format does not read, and that the target and JSON can store."""
    used = {*source.fields(record), *target.fields(record)}
    return {name: value for name, value in record.items() if name not in used and _is_json(value)}


def _is_json(value: object) -> bool:
    try:
        check_json(value, "field")
    except InvalidRecord:
        return False
    return True


def conversion_changes(record: Record, conversation: Conversation, source: Format, target: Format) -> Iterator[str]:
    """Yield a description of each kind of difference between a record and its converted form.

    Args:
        conversation: the record as parsed by ``source``.
    """
    stored = {*source.fields(record), *other_fields(record, source, target)}
    for name, value in record.items():
        if name not in stored and not is_empty(value):
            yield f"the field {short_repr(name)} is not kept"
    for name in dict.fromkeys(_unread_turn_fields(record, source)):
        yield f"the field {short_repr(name)} of turns is not kept"
    with_calls = [turn for turn in conversation.turns if turn.calls]
    calls = [call for turn in with_calls for call in turn.calls]
    if target.name == "conversations" and any(turn.content for turn in with_calls):
        yield "the text of a turn with calls becomes a separate turn"
    if source.name in ("messages", "pairs") and _has_ids(_entries(record, source)):
        yield "ids of calls are not kept" if target.name == "conversations" else "ids of calls are replaced by numbers"
    if source.name == "conversations" and any(_loses_string_type(call, target) for call in calls):
        yield "arguments that are a JSON string are read as encoded arguments"
    if NULLS_LEFT_OUT in conversation.notes:
        yield "null fields in tools or arguments are not kept"


def _loses_string_type(call: ToolCall, target: Format) -> bool:
    """Return whether string arguments become another value, or the same as encoded arguments."""
    return isinstance(call.arguments, str) and (
        target.name != "conversations" or not isinstance(arguments_value(call), str)
    )


def _entries(record: Record, source: Format) -> list[Record]:
    """Return the turns of a record in the format ``source``; for pairs those of its two lists."""
    if source.name == "pairs":
        names = dict.fromkeys(name for pair in PAIRS for name in pair)
        return [entry for name in names if isinstance(record.get(name), list) for entry in record[name]]
    return next((record[name] for name in ("conversations", "messages") if isinstance(record.get(name), list)), [])


def _has_ids(entries: Iterable[Record]) -> bool:
    return any(call.get("id") for entry in entries for call in entry.get("tool_calls") or [])


def _unread_turn_fields(record: Record, source: Format) -> Iterator[str]:
    known = _FIELDS_OF_TURNS.get(source.name)
    if known is None:
        return
    entries = _entries(record, source)
    yield from _unread(entries, known)
    if source.name == "conversations":
        calls = [json.loads(entry["value"]) for entry in entries if entry["from"] in CALL_AUTHORS]
        yield from _unread(calls, _CALLS)


def _unread(value: object, known: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Yield the dotted names of fields that are not empty and not known.

    Args:
        known: field -> the known fields of its value; if empty, all are.
    """
    if isinstance(value, list):
        for item in value:
            yield from _unread(item, known, path)
    elif isinstance(value, dict) and known:
        for name, item in value.items():
            if name in known:
                yield from _unread(item, known[name], f"{path}{name}.")
            elif not is_empty(item):
                yield path + name
