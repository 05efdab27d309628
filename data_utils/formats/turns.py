"""Parse the formats with a list of turns per record: ``conversations`` and ``messages``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

from chat.turns import ToolCall, Turn
from data_utils.formats.calls import ReadTurn, match_results, parse_call, parse_call_text, parse_tool_calls
from data_utils.formats.parts import Content, parse_parts
from data_utils.formats.tools import parse_tools
from data_utils.schema import (
    SYSTEM_FIELDS,
    TURN_FIELDS,
    UNSUPPORTED_IN_TURNS,
    InvalidRecord,
    Notes,
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
        "tool_call": "assistant",
        "tool_response": "tool",
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
        "function_call": "assistant",
        "observation": "tool",
        "tool_call": "assistant",
        "tool_response": "tool",
    },
    'Write {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
)

# What other sources call the authors.
_OTHER_NAMES = {
    "user": ("human", "prompter", "customer", "question"),
    "assistant": ("gpt", "bot", "chatbot", "chatgpt", "model", "ai", "agent", "answer"),
    "tool": ("ipython", "tool_result", "tool_output", "observation", "environment"),
    "system": ("system_prompt", "developer", "instruction"),
}

FUNCTION_CALL, TOOL_CALL = "function_call", "tool_call"
CALL_AUTHORS = (FUNCTION_CALL, TOOL_CALL)
"""Authors whose text is a call."""

_CALL_FIELDS = ("tool_calls", "function_call")
_CONVERSATION_FIELDS = TURN_FIELDS | {*_CALL_FIELDS}
_UNSUPPORTED_IN_CONVERSATIONS = {
    **UNSUPPORTED_IN_TURNS,
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
    return ("conversations", "messages", *SYSTEM_FIELDS, "tools", "functions")


def parse_conversations(record: Record, notes: Notes) -> ParsedRecord:
    """Parse a record in the original format of Qwen, or in ShareGPT's.

    Raises:
        InvalidRecord: the record does not have this format.
    """
    entries = _entries(record, CONVERSATIONS)
    turns = _plain_turns(entries, CONVERSATIONS)
    if turns is None:
        read = [_parse_conversation_turn(entry, number, notes) for number, entry in enumerate(entries, 1)]
        turns = match_results(_join_calls(read))
    return prepend_system(record, turns), parse_tools(record, notes)


def _plain_turns(entries: Sequence[object], style: TurnStyle) -> list[Turn] | None:
    """Return the turns of entries that have an author, a text and nothing else, as nearly all have; else ``None``."""
    turns: list[Turn] = []
    for entry in entries:
        if not isinstance(entry, dict) or len(entry) != 2:
            return None
        author, text = entry.get(style.author), entry.get(style.text)
        if not isinstance(author, str) or not isinstance(text, str):
            return None
        role = style.roles.get(author)
        if role is None or role == "tool" or author in CALL_AUTHORS or (role == "system" and turns):
            return None
        turns.append(Turn(role, text))
    return turns


def _parse_conversation_turn(entry: object, number: int, notes: Notes) -> tuple[str, ReadTurn]:
    """Return the author and the turn of an entry."""
    author, role = _author(entry, number, CONVERSATIONS)
    assert isinstance(entry, dict), "checked by _author"
    owner, text = f"turn {number}", entry.get("value")
    if not isinstance(text, str):
        raise _invalid_text(entry, number, CONVERSATIONS)
    weight = thinking = None
    if not _CONVERSATION_FIELDS.isdisjoint(entry):
        check_unsupported(entry, _UNSUPPORTED_IN_CONVERSATIONS, owner)
        weight = parse_weight(entry, owner)
        thinking = parse_thinking(entry, role, owner)
    if author in CALL_AUTHORS:
        turn = Turn(role, "", parse_call_text(text, owner, notes), weight, thinking)
    else:
        turn = Turn(role, text, (), weight, thinking)
    return author, ReadTurn(turn, number)


def parse_messages(record: Record, notes: Notes) -> ParsedRecord:
    """Parse a record in OpenAI's format.

    Raises:
        InvalidRecord: the record does not have this format.
    """
    return prepend_system(record, parse_message_list(_entries(record, MESSAGES), notes)), parse_tools(record, notes)


def parse_message_list(entries: Sequence[object], notes: Notes, untrained: int = 0) -> list[Turn]:
    """Parse messages in OpenAI's format.

    Args:
        untrained: number of messages at the start that are not trained, unless they have a weight of their own.

    Raises:
        InvalidRecord: not such messages.
    """
    if not untrained and (turns := _plain_turns(entries, MESSAGES)) is not None:
        return turns
    read = [_parse_message(entry, number, notes) for number, entry in enumerate(entries, 1)]
    for index, (author, item) in enumerate(read[:untrained]):
        if item.turn.role == "assistant" and item.turn.weight is None:
            read[index] = author, item._replace(turn=item.turn._replace(weight=0.0))
    return match_results(_join_calls(read))


def _parse_message(entry: object, number: int, notes: Notes) -> tuple[str, ReadTurn]:
    """Return the author and the turn of an entry."""
    author, role = _author(entry, number, MESSAGES)
    assert isinstance(entry, dict), "checked by _author"
    owner = f"turn {number}"
    weight = thinking = None
    calls: tuple[ToolCall, ...] = ()
    if len(entry) > 2 or "content" not in entry:
        if not TURN_FIELDS.isdisjoint(entry):
            check_unsupported(entry, UNSUPPORTED_IN_TURNS, owner)
            weight = parse_weight(entry, owner)
            thinking = parse_thinking(entry, role, owner)
        calls = parse_tool_calls(entry, owner, notes)
    content = _parse_content(entry, author, bool(calls), number, notes)
    if content.calls and calls:
        raise InvalidRecord(f'{owner} has calls in its content and in "tool_calls"', "Keep one of them")
    if content.thinking is not None:
        if thinking not in (None, content.thinking):
            what = f"the reasoning in the content of {owner} and its field differ"
            raise InvalidRecord(what, "Keep one of them")
        # As the field: refused for other roles, empty is none.
        thinking = parse_thinking({"reasoning": content.thinking}, role, owner)
    calls = calls or content.calls
    if calls and role != "assistant":
        raise InvalidRecord(f"{owner} is from {short_repr(author)} and calls a function", "Only the assistant can call")
    return author, ReadTurn(Turn(role, content.text, calls, weight, thinking), number, _ids(entry, role, len(calls)))


def _parse_content(entry: Record, author: str, has_calls: bool, number: int, notes: Notes) -> Content:
    content, owner = entry.get("content"), f"turn {number}"
    if author in CALL_AUTHORS and not has_calls:
        if isinstance(content, str):
            return Content("", None, parse_call_text(content, owner, notes))
        if isinstance(content, dict):
            return Content("", None, (parse_call(content, owner, notes),))
    if isinstance(content, str):
        return Content(content)
    if isinstance(content, list):
        return parse_parts(content, owner, notes)
    if content is None and has_calls:
        return Content("")
    raise _invalid_text(entry, number, MESSAGES)


def _ids(message: Record, role: str, count: int) -> list[object]:
    """Return the ids of a message's calls, or the id of the call that it answers; ``None`` for a missing id."""
    calls = message.get("tool_calls")
    if role == "tool":
        ids = [message.get("tool_call_id")]
    else:
        ids = [call.get("id") for call in calls] if isinstance(calls, list) and calls else [None] * count
    return [None if is_empty(id_) else id_ for id_ in ids]


def _join_calls(read: Sequence[tuple[str, ReadTurn]]) -> list[ReadTurn]:
    """Return the turns, with each ``tool_call`` as a part of the answer before it, if there is one.

    Raises:
        InvalidRecord: the two have different weights, or reasoning between text and call.
    """
    joined: list[ReadTurn] = []
    for author, item in read:
        before = joined[-1] if joined else None
        if author != TOOL_CALL or before is None or before.turn.role != "assistant":
            joined.append(item)
            continue
        turn, both = before.turn, f"turns {before.number} and {item.number} are one answer"
        if turn.weight != item.turn.weight:
            raise InvalidRecord(f"{both}, but have different weights", "Give both the same")
        if item.turn.thinking and (turn.content or turn.thinking or turn.calls):
            raise InvalidRecord(f"{both}, but the second has reasoning of its own", "Move it to the first")
        turn = turn._replace(calls=turn.calls + item.turn.calls, thinking=item.turn.thinking or turn.thinking)
        joined[-1] = ReadTurn(turn, item.number, [*before.ids, *item.ids])
    return joined


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


def _author(entry: object, number: int, style: TurnStyle) -> tuple[str, str]:
    """Return the author of an entry, and the role."""
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
            f"turn {number} is from an unknown role, {short_repr(author)}",
            f"Known roles are {', '.join(style.roles)}{_role_hint(author, style)}",
        )
    if role == "system" and number > 1:
        raise InvalidRecord(
            f"turn {number} is from {short_repr(author)}", "A system message can only be the first turn"
        )
    assert isinstance(author, str), "otherwise it has no role"
    return author, role


def _role_hint(author: object, style: TurnStyle) -> str:
    """Return a question that names the role that is probably meant, or nothing."""
    name = author[:40].strip(" \t\r\n:<|>").lower() if isinstance(author, str) else ""
    meant = next((role for role, names in _OTHER_NAMES.items() if name in names), None)
    close = [name] if name in style.roles else get_close_matches(name, style.roles, 1, 0.75)
    known = close[0] if close else next((own for own, role in style.roles.items() if role == meant), None)
    return "" if known is None else f". Is {known!r} meant?"


def _invalid_text(entry: Record, number: int, style: TurnStyle) -> InvalidRecord:
    if style.text not in entry:
        what = f'turn {number} has no "{style.text}", its fields are {short_repr(list(entry))}'
        return InvalidRecord(what, style.example)
    text = short_repr(entry[style.text])
    return InvalidRecord(
        f'the "{style.text}" of turn {number} must be a string, not {text}', "Write the text as a string"
    )
