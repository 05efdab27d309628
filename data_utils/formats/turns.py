"""The two formats whose records hold a list of turns: ``conversations`` and ``messages``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from chat.turns import Tool, ToolCall, Turn
from data_utils.formats.tools import match_results, parse_call_text, parse_json, parse_tool_calls, parse_tools
from data_utils.schema import (
    MEDIA_REFUSALS,
    TURN_FIELDS,
    Conversation,
    InvalidRecord,
    is_empty,
    parse_thinking,
    parse_weight,
    refuse,
    shown,
    with_system,
)

Record = dict[str, Any]
Parsed = tuple[list[Turn], tuple[Tool, ...]]


class Style(NamedTuple):
    """How a format writes a list of turns.

    Attributes:
        lists: the names that the list may have, the format's own first.
        author: the field that says who speaks.
        text: the field with what is said.
        roles: the names of those who speak, and the role that each has.
        example: what a record looks like, for messages.
    """

    lists: tuple[str, str]
    author: str
    text: str
    roles: Mapping[str, str]
    example: str


CONVERSATIONS = Style(
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
MESSAGES = Style(
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

_CALLS = "function_call"
_CALL_FIELDS = ("tool_calls", "function_call")
_CONVERSATION_FIELDS = TURN_FIELDS | {*_CALL_FIELDS}
_CONVERSATION_REFUSALS = {
    **MEDIA_REFUSALS,
    **{
        name: (
            "calls are turns of their own here",
            'Write {"from": "function_call", "value": "{\\"name\\": ..., \\"arguments\\": ...}"}, or use "messages"',
        )
        for name in _CALL_FIELDS
    },
}


# --------------------------------------------------------------------------------------------------- record -> turns


def looks_like(record: Record, style: Style) -> bool:
    """Whether a record has a list of turns in this style: its first turn decides, or the name of an empty list."""
    name = next((name for name in style.lists if record.get(name) is not None), "")
    entries = record.get(name)
    if not isinstance(entries, list):
        return False
    if not entries:
        return name == style.lists[0]
    return isinstance(entries[0], dict) and entries[0].get(style.author) is not None


def record_fields(record: Record) -> Iterable[str]:
    """The fields of a record that these formats read."""
    return ("conversations", "messages", "system", "tools", "functions")


def parse_conversations(record: Record) -> Parsed:
    """The original format and ShareGPT's.

    Raises:
        InvalidRecord: anything else.
    """
    entries = _entries(record, CONVERSATIONS)
    turns = match_results([_parse_conversation_turn(entry, number) for number, entry in enumerate(entries, 1)])
    return with_system(record, turns), parse_tools(record)


def _parse_conversation_turn(entry: object, number: int) -> Turn:
    role = _role(entry, number, CONVERSATIONS)
    assert isinstance(entry, dict), "_role has looked at it"
    text = entry.get("value")
    if not isinstance(text, str):
        raise _no_text(entry, number, CONVERSATIONS)
    weight = thinking = None
    if not _CONVERSATION_FIELDS.isdisjoint(entry):
        refuse(entry, _CONVERSATION_REFUSALS, f"turn {number}")
        weight = parse_weight(entry, f"turn {number}")
        thinking = parse_thinking(entry, role, f"turn {number}")
    if entry["from"] == _CALLS:
        return Turn(role, "", parse_call_text(text, f"turn {number}"), weight, thinking)
    return Turn(role, text, (), weight, thinking)


def parse_messages(record: Record) -> Parsed:
    """OpenAI's format.

    Raises:
        InvalidRecord: anything else.
    """
    entries = _entries(record, MESSAGES)
    turns = [_parse_message(entry, number) for number, entry in enumerate(entries, 1)]
    return with_system(record, match_results(turns, lambda index: _ids(entries[index]))), parse_tools(record)


def _parse_message(entry: object, number: int) -> Turn:
    role = _role(entry, number, MESSAGES)
    assert isinstance(entry, dict), "_role has looked at it"
    weight = thinking = None
    calls: tuple[ToolCall, ...] = ()
    if len(entry) > 2 or "content" not in entry:
        owner = f"turn {number}"
        if not TURN_FIELDS.isdisjoint(entry):
            refuse(entry, MEDIA_REFUSALS, owner)
            weight = parse_weight(entry, owner)
            thinking = parse_thinking(entry, role, owner)
        calls = parse_tool_calls(entry, owner)
        if calls and role != "assistant":
            raise InvalidRecord(
                f"{owner} is from {shown(entry['role'])} and calls a function", "Only the assistant calls"
            )
    content = entry.get("content")
    if isinstance(content, str):
        return Turn(role, content, calls, weight, thinking)
    if isinstance(content, list):
        return Turn(role, "".join(_part_texts(content, number)), calls, weight, thinking)
    if content is None and calls:
        return Turn(role, "", calls, weight, thinking)
    raise _no_text(entry, number, MESSAGES)


def _part_texts(parts: list[Any], number: int) -> Iterator[str]:
    fix = 'Write {"type": "text", "text": "..."}, or a string instead of the list'
    for part in parts:
        if not isinstance(part, dict):
            raise InvalidRecord(f"a part of turn {number} must be an object, not {shown(part)}", fix)
        if part.get("type") != "text":
            raise InvalidRecord(
                f"turn {number} has a part of type {shown(part.get('type'))}: only text can be trained on", fix
            )
        text = part.get("text")
        if not isinstance(text, str):
            raise InvalidRecord(f'the "text" of a part of turn {number} must be a string, not {shown(text)}', fix)
        yield text


def _ids(message: Record) -> list[object]:
    """Ids of a message's calls, or the id of the call that it is the result of. An empty one is none."""
    calls = message.get("tool_calls")
    if MESSAGES.roles[message["role"]] == "tool":
        ids = [message.get("tool_call_id")]
    else:
        ids = [call.get("id") for call in calls] if isinstance(calls, list) and calls else [None]
    return [None if is_empty(id_) else id_ for id_ in ids]


def _entries(record: Record, style: Style) -> list[Any]:
    own, other = style.lists
    entries, others = record.get(own), record.get(other)
    name = own
    if entries is None:
        entries, name = others, other
    elif others is not None:
        raise InvalidRecord(f'the record has "{own}" and "{other}"', "Keep one of them")
    if entries is None:
        raise InvalidRecord(f'the record has no "{own}", its fields are {shown(list(record))}', style.example)
    if not isinstance(entries, list):
        raise InvalidRecord(f'"{name}" must be a list of turns, not {shown(entries)}', style.example)
    if not entries:
        raise InvalidRecord(f'"{name}" is empty', "Give it at least one turn, or remove the record")
    return entries


def _role(entry: object, number: int, style: Style) -> str:
    if not isinstance(entry, dict):
        raise InvalidRecord(f"turn {number} must be an object, not {shown(entry)}", style.example)
    author = entry.get(style.author)
    role = style.roles.get(author) if isinstance(author, str) else None
    if role is None:
        if author is None:
            raise InvalidRecord(
                f'turn {number} has no "{style.author}", its fields are {shown(list(entry))}', style.example
            )
        raise InvalidRecord(
            f"turn {number} is from an unknown role, {shown(author)}", f"Known roles are {', '.join(style.roles)}"
        )
    if role == "system" and number > 1:
        raise InvalidRecord(f"turn {number} is from {shown(author)}", "A system message can only be the first turn")
    return role


def _no_text(entry: Record, number: int, style: Style) -> InvalidRecord:
    if style.text not in entry:
        return InvalidRecord(f'turn {number} has no "{style.text}", its fields are {shown(list(entry))}', style.example)
    text = shown(entry[style.text])
    return InvalidRecord(
        f'the "{style.text}" of turn {number} must be a string, not {text}', "Write the text as a string"
    )


# --------------------------------------------------------------------------------------------------- turns -> record


def write_conversations(conversation: Conversation, extra: Record) -> Record:
    """A record that ``parse_conversations`` reads as the same conversation.

    Text beside calls becomes a turn of its own before them, which is the one thing that changes; thinking stands before
    both. Arguments that are
    text become the JSON value whose text they are, as long as that text comes back from it.

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
            entries.append({"from": _CALLS, "value": value, **thinking, **weight})
    tools = {"tools": json.dumps(conversation.tools, ensure_ascii=False)} if conversation.tools else {}
    return {**extra, "conversations": entries, **tools}


def arguments_value(call: ToolCall) -> Any:
    """The arguments of a call as ``conversations`` writes them."""
    if not isinstance(call.arguments, str):
        return call.arguments
    try:
        value = parse_json(call.arguments, "arguments")
    except InvalidRecord:
        return call.arguments
    # A string would be taken for the text of arguments again, and null for none.
    if value is None or isinstance(value, str) or json.dumps(value, ensure_ascii=False) != call.arguments:
        return call.arguments
    return value


def write_messages(conversation: Conversation, extra: Record) -> Record:
    """A record that ``parse_messages`` reads as the same conversation, with the arguments of calls as their text.

    Args:
        extra: other fields of the record.
    """
    messages: list[Record] = []
    counted = 0
    answered: list[str] = []
    for turn in conversation.turns:
        message: Record = {"role": turn.role, "content": turn.content}
        if turn.calls:
            answered = [f"call_{number}" for number in range(counted + 1, counted + len(turn.calls) + 1)]
            counted += len(turn.calls)
            message["tool_calls"] = [
                {"id": id_, "type": "function", "function": {"name": call.name, "arguments": call.arguments_text}}
                for id_, call in zip(answered, turn.calls, strict=True)
            ]
        elif turn.role == "tool":
            message["tool_call_id"] = answered.pop(0)
        messages.append({**message, **_thinking_fields(turn), **_weight_fields(turn)})
    tools = {"tools": list(conversation.tools)} if conversation.tools else {}
    return {**extra, "messages": messages, **tools}


def _thinking_fields(turn: Turn) -> Record:
    return {} if turn.thinking is None else {"reasoning_content": turn.thinking}


def _weight_fields(turn: Turn) -> Record:
    if turn.weight is None:
        return {}
    return {"train": bool(turn.weight)} if turn.weight in (0.0, 1.0) else {"weight": turn.weight}
