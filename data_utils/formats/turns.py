"""Parse the formats with a list of turns per record: ``conversations`` and ``messages``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from chat.turns import ToolCall, Turn
from data_utils.formats.tools import match_results, parse_call_text, parse_tool_calls, parse_tools
from data_utils.schema import (
    TURN_FIELDS,
    UNSUPPORTED_MEDIA,
    InvalidRecord,
    ParsedRecord,
    Record,
    check_unsupported,
    is_empty,
    parse_thinking,
    parse_weight,
    prepend_system,
    short_repr,
)


class TurnStyle(NamedTuple):
    """Field and role names of a format that lists turns.

    Attributes:
        lists: names that the list may have; the format's own name first.
        author: the field with the author of a turn.
        text: the field with its text.
        roles: author -> role.
        example: a record, for messages.
    """

    lists: tuple[str, str]
    author: str
    text: str
    roles: Mapping[str, str]
    example: str


CONVERSATIONS = TurnStyle(
    ("conversations", "messages"),
    "from",
    "value",
    {
        "user": "user",
        "human": "user",
        "assistant": "assistant",
        "gpt": "assistant",
        "system": "system",
        "function_call": "assistant",
        "observation": "tool",
        "tool": "tool",
        "function": "tool",
    },
    'Write {"conversations": [{"from": "user", "value": "..."}, {"from": "assistant", "value": "..."}]}',
)
MESSAGES = TurnStyle(
    ("messages", "conversations"),
    "role",
    "content",
    {
        "system": "system",
        "developer": "system",
        "user": "user",
        "assistant": "assistant",
        "tool": "tool",
        "function": "tool",
    },
    'Write {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
)

FUNCTION_CALL = "function_call"
_CALL_FIELDS = ("tool_calls", "function_call")
_CONVERSATION_FIELDS = TURN_FIELDS | {*_CALL_FIELDS}
_UNSUPPORTED_IN_CONVERSATIONS = {
    **UNSUPPORTED_MEDIA,
    **{
        name: (
            "in this format a call is a turn of its own",
            'Write {"from": "function_call", "value": "{\\"name\\": ..., \\"arguments\\": ...}"}, or use "messages"',
        )
        for name in _CALL_FIELDS
    },
}


def looks_like(record: Record, style: TurnStyle) -> bool:
    """Return whether a record has a list of turns in this style, judged by its first turn, or its name if empty."""
    name = next((name for name in style.lists if record.get(name) is not None), "")
    entries = record.get(name)
    if not isinstance(entries, list):
        return False
    if not entries:
        return name == style.lists[0]
    return isinstance(entries[0], dict) and entries[0].get(style.author) is not None


def record_fields(record: Record) -> Iterable[str]:
    """Return the fields of a record that these formats read."""
    return ("conversations", "messages", "system", "tools", "functions")


def parse_conversations(record: Record) -> ParsedRecord:
    """Parse a record in the original format of Qwen, or in ShareGPT's.

    Raises:
        InvalidRecord: the record does not have this format.
    """
    entries = _entries(record, CONVERSATIONS)
    turns = match_results([_parse_conversation_turn(entry, number) for number, entry in enumerate(entries, 1)])
    return prepend_system(record, turns), parse_tools(record)


def _parse_conversation_turn(entry: object, number: int) -> Turn:
    role = _role(entry, number, CONVERSATIONS)
    assert isinstance(entry, dict), "checked by _role"
    text = entry.get("value")
    if not isinstance(text, str):
        raise _invalid_text(entry, number, CONVERSATIONS)
    weight = thinking = None
    if not _CONVERSATION_FIELDS.isdisjoint(entry):
        check_unsupported(entry, _UNSUPPORTED_IN_CONVERSATIONS, f"turn {number}")
        weight = parse_weight(entry, f"turn {number}")
        thinking = parse_thinking(entry, role, f"turn {number}")
    if entry["from"] == FUNCTION_CALL:
        return Turn(role, "", parse_call_text(text, f"turn {number}"), weight, thinking)
    return Turn(role, text, (), weight, thinking)


def parse_messages(record: Record) -> ParsedRecord:
    """Parse a record in OpenAI's format.

    Raises:
        InvalidRecord: the record does not have this format.
    """
    entries = _entries(record, MESSAGES)
    turns = [_parse_message(entry, number) for number, entry in enumerate(entries, 1)]
    return prepend_system(record, match_results(turns, lambda index: _ids(entries[index]))), parse_tools(record)


def _parse_message(entry: object, number: int) -> Turn:
    role = _role(entry, number, MESSAGES)
    assert isinstance(entry, dict), "checked by _role"
    weight = thinking = None
    calls: tuple[ToolCall, ...] = ()
    if len(entry) > 2 or "content" not in entry:
        owner = f"turn {number}"
        if not TURN_FIELDS.isdisjoint(entry):
            check_unsupported(entry, UNSUPPORTED_MEDIA, owner)
            weight = parse_weight(entry, owner)
            thinking = parse_thinking(entry, role, owner)
        calls = parse_tool_calls(entry, owner)
        if calls and role != "assistant":
            raise InvalidRecord(
                f"{owner} is from {short_repr(entry['role'])} and calls a function", "Only the assistant can call"
            )
    content = entry.get("content")
    if isinstance(content, str):
        return Turn(role, content, calls, weight, thinking)
    if isinstance(content, list):
        return Turn(role, "".join(_part_texts(content, number)), calls, weight, thinking)
    if content is None and calls:
        return Turn(role, "", calls, weight, thinking)
    raise _invalid_text(entry, number, MESSAGES)


def _part_texts(parts: list[Any], number: int) -> Iterator[str]:
    fix = 'Write {"type": "text", "text": "..."}, or a string instead of the list'
    for part in parts:
        if not isinstance(part, dict):
            raise InvalidRecord(f"a part of turn {number} must be an object, not {short_repr(part)}", fix)
        if part.get("type") != "text":
            raise InvalidRecord(
                f"turn {number} has a part of type {short_repr(part.get('type'))}: only text can be trained on", fix
            )
        text = part.get("text")
        if not isinstance(text, str):
            raise InvalidRecord(f'the "text" of a part of turn {number} must be a string, not {short_repr(text)}', fix)
        yield text


def _ids(message: Record) -> list[object]:
    """Return the ids of a message's calls, or the id of the call that it answers; ``None`` for a missing id."""
    calls = message.get("tool_calls")
    if MESSAGES.roles[message["role"]] == "tool":
        ids = [message.get("tool_call_id")]
    else:
        ids = [call.get("id") for call in calls] if isinstance(calls, list) and calls else [None]
    return [None if is_empty(id_) else id_ for id_ in ids]


def _entries(record: Record, style: TurnStyle) -> list[Any]:
    own, other = style.lists
    entries, other_entries = record.get(own), record.get(other)
    name = own
    if entries is None:
        entries, name = other_entries, other
    elif other_entries is not None:
        raise InvalidRecord(f'the record has "{own}" and "{other}"', "Keep one of them")
    if entries is None:
        raise InvalidRecord(f'the record has no "{own}", its fields are {short_repr(list(record))}', style.example)
    if not isinstance(entries, list):
        raise InvalidRecord(f'"{name}" must be a list of turns, not {short_repr(entries)}', style.example)
    if not entries:
        raise InvalidRecord(f'"{name}" is empty', "Give it at least one turn, or remove the record")
    return entries


def _role(entry: object, number: int, style: TurnStyle) -> str:
    if not isinstance(entry, dict):
        raise InvalidRecord(f"turn {number} must be an object, not {short_repr(entry)}", style.example)
    author = entry.get(style.author)
    role = style.roles.get(author) if isinstance(author, str) else None
    if role is None:
        if author is None:
            raise InvalidRecord(
                f'turn {number} has no "{style.author}", its fields are {short_repr(list(entry))}', style.example
            )
        raise InvalidRecord(
            f"turn {number} is from an unknown role, {short_repr(author)}", f"Known roles are {', '.join(style.roles)}"
        )
    if role == "system" and number > 1:
        raise InvalidRecord(
            f"turn {number} is from {short_repr(author)}", "A system message can only be the first turn"
        )
    return role


def _invalid_text(entry: Record, number: int, style: TurnStyle) -> InvalidRecord:
    if style.text not in entry:
        what = f'turn {number} has no "{style.text}", its fields are {short_repr(list(entry))}'
        return InvalidRecord(what, style.example)
    text = short_repr(entry[style.text])
    return InvalidRecord(
        f'the "{style.text}" of turn {number} must be a string, not {text}', "Write the text as a string"
    )
