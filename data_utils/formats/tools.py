"""Parse descriptions of functions (tools)."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType
from typing import Any

from chat.turns import Tool
from data_utils.formats.json_text import parse_json, without_nulls
from data_utils.schema import (
    NULLS_LEFT_OUT,
    PARAMETERS_NOT_OBJECTS,
    InvalidRecord,
    Notes,
    check_json,
    is_empty,
    short_repr,
)

_TOOL_FIELDS = ("tools", "functions")
_TOOL_NAMES = ("name", "name_for_model")
_TOOL_TEXTS = (*_TOOL_NAMES, "name_for_human", "description", "description_for_model")
_PARAMETERS = ("parameters", "input_schema", "inputSchema")  # the first is used for writing; Anthropic's, MCP's

_TOOLS_FIX = 'Write a list of {"name": "...", "description": "...", "parameters": {...}}'


def parse_tools(record: Mapping[str, Any], notes: Notes) -> tuple[Tool, ...]:
    """Return the functions that ``tools`` or ``functions`` of a record describe, as a list or as its JSON text.

    Parameters under another known name (``input_schema``, ``inputSchema``) are renamed, and null fields left out.

    Raises:
        InvalidRecord: not such a list, both fields, or a description without a name.
    """
    if "tools" not in record and "functions" not in record:
        return ()
    lists = {field: tools for field in _TOOL_FIELDS if (tools := _tool_list(record.get(field), field, notes))}
    if len(lists) > 1:
        raise InvalidRecord('the record has "tools" and "functions"', "Keep one of them")
    for field, tools in lists.items():
        return tuple(_parse_tool(tool, f'tool {number} in "{field}"', notes) for number, tool in enumerate(tools, 1))
    return ()


def tool_names(tool: Tool) -> set[str]:
    """Return the names by which calls may name a tool."""
    description = tool.get("function") or tool
    return {name for key in _TOOL_NAMES if isinstance(name := description.get(key), str)}


def _tool_list(value: object, field: str, notes: Notes) -> list[Any]:
    """Return the list of a field. JSON text is decoded as it is; other lists lose the null fields of a typed table."""
    if isinstance(value, str):
        value = parse_json(value, f'"{field}"', _TOOLS_FIX) if value.strip() else None
    elif isinstance(value, list):
        check_json(value, f'"{field}"')
        kept = without_nulls(value)
        if kept != value:
            notes.add(NULLS_LEFT_OUT)
        # Tables without nested columns store each tool as JSON text.
        value = [
            parse_json(tool, f'tool {number} in "{field}"', _TOOLS_FIX)
            if isinstance(tool, str) and tool.lstrip().startswith("{")
            else tool
            for number, tool in enumerate(kept, 1)
        ]
    if value is None:
        return []
    if not isinstance(value, list):
        what = f'"{field}" must be a list of tools, or one as JSON text, not {short_repr(value)}'
        raise InvalidRecord(what, _TOOLS_FIX)
    return value


def _parse_tool(tool: object, owner: str, notes: Notes) -> Tool:
    inner = tool.get("function") if isinstance(tool, dict) else tool
    description = tool if inner is None else inner
    if not isinstance(description, dict):
        raise InvalidRecord(f"{owner} must be an object, not {short_repr(description)}", _TOOLS_FIX)
    if all(is_empty(description.get(key)) for key in _TOOL_NAMES):
        raise InvalidRecord(f"{owner} has no name: {short_repr(tool)}", _TOOLS_FIX)
    for key in _TOOL_TEXTS:
        if not isinstance(description.get(key), (str, NoneType)):
            raise InvalidRecord(f'"{key}" of {owner} must be a string, not {short_repr(description[key])}', _TOOLS_FIX)
    parsed = _with_parameters(description, owner, notes)
    return parsed if inner is None or not isinstance(tool, dict) else {**tool, "function": parsed}


def _with_parameters(description: Tool, owner: str, notes: Notes) -> Tool:
    """Return a description with its parameters, decoded if they are JSON text, as ``parameters``."""
    given = {name: value for name in _PARAMETERS if (value := description.get(name)) is not None}
    given = {name: value for name, value in given.items() if not is_empty(value)} or given
    if not given:
        return description
    name, value = next(iter(given.items()))
    if any(other != value for other in given.values()):
        names = " and ".join(f'"{name}"' for name in given)
        raise InvalidRecord(f"{names} of {owner} have the same meaning but differ", "Keep one of them")
    if isinstance(value, str) and value.strip()[:1] in ("{", "["):
        value = parse_json(value, f'"{name}" of {owner}', _TOOLS_FIX)
    if not isinstance(value, (dict, list)):  # Qwen v1's own descriptions have a list
        notes.add(PARAMETERS_NOT_OBJECTS)
    # In the place of the field that is used, without the others.
    kept = ((key, item) for key, item in description.items() if key in ("parameters", name) or key not in _PARAMETERS)
    fields = {"parameters" if key == name else key: item for key, item in kept}
    return {**fields, "parameters": value}
