"""Parse the content of a message that is a list of parts: text, reasoning and calls.

A part is ``{"type": "text", "text": "..."}``, or has its text in ``value``. A part of the type ``tool_call`` has a
call, or its JSON text, as ``value``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from chat.turns import ToolCall
from data_utils.formats.calls import parse_call, parse_call_text
from data_utils.schema import InvalidRecord, Notes, short_repr

_TEXT, _REASONING, _CALL = "text", "reasoning", "tool_call"
_KINDS = {
    "text": _TEXT, "input_text": _TEXT, "output_text": _TEXT, "reasoning": _REASONING, "thinking": _REASONING,
    "tool_call": _CALL, "tool_calls": _CALL,
}  # fmt: skip
_VALUES = {_TEXT: ("text", "value"), _REASONING: ("value", "text", "reasoning", "thinking"), _CALL: ("value",)}
_MEDIA = ("image", "video", "audio", "input_image", "input_audio", "input_file", "file")

_PART_FIX = 'Write {"type": "text", "text": "..."}, or a string instead of the list'
_ORDER_FIX = "An answer is written as reasoning, then text, then calls: split the message"


class Content(NamedTuple):
    """The content of a message. ``thinking`` is ``None`` without a part of that type."""

    text: str
    thinking: str | None = None
    calls: tuple[ToolCall, ...] = ()


def parse_parts(parts: list[Any], owner: str, notes: Notes) -> Content:
    """Join the parts of a message.

    Raises:
        InvalidRecord: a part of another type, or in an order that cannot be written.
    """
    texts: list[str] = []
    thoughts: list[str] = []
    calls: tuple[ToolCall, ...] = ()
    for part in parts:
        kind, value = _parse_part(part, owner)
        if calls and kind != _CALL and value:
            raise InvalidRecord(f"{owner} has a part of type {short_repr(part['type'])} after a call", _ORDER_FIX)
        if kind == _CALL:
            is_text = isinstance(value, str)
            calls += parse_call_text(value, owner, notes) if is_text else (parse_call(value, owner, notes),)
        elif kind == _TEXT:
            texts.append(value)
        elif any(texts) and value:
            raise InvalidRecord(f"{owner} has a part of type {short_repr(part['type'])} after text", _ORDER_FIX)
        else:
            thoughts.append(value)
    return Content("".join(texts), "".join(thoughts) if thoughts else None, calls)


def _parse_part(part: object, owner: str) -> tuple[str, Any]:
    """Return the kind of a part and its value: a string, or a call."""
    if not isinstance(part, dict):
        raise InvalidRecord(f"a part of {owner} must be an object, not {short_repr(part)}", _PART_FIX)
    type_ = part.get("type")
    kind = _KINDS.get(type_) if isinstance(type_, str) else None
    if kind is None:
        what = f"{owner} has a part of type {short_repr(type_)}"
        named = type_ if isinstance(type_, str) else next(iter(part), "")  # Qwen-VL's parts have no type
        if named.startswith(_MEDIA):
            raise InvalidRecord(f"{what}: only text can be trained on", _PART_FIX)
        raise InvalidRecord(what, f'Known types are {", ".join(_KINDS)}. Calls may also be in "tool_calls"')
    values = [part[name] for name in _VALUES[kind] if part.get(name) is not None]
    if len(values) > 1 and any(value != values[0] for value in values):
        names = " and ".join(f'"{name}"' for name in _VALUES[kind] if part.get(name) is not None)
        raise InvalidRecord(f"{names} of a part of {owner} have the same meaning but differ", "Keep one of them")
    value = values[0] if values else None
    if not isinstance(value, str) and not (kind == _CALL and isinstance(value, dict)):
        name = _VALUES[kind][0]
        raise InvalidRecord(f'the "{name}" of a part of {owner} must be a string, not {short_repr(value)}', _PART_FIX)
    return kind, value
