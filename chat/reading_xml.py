"""Calls as ``chat.tools_xml`` writes them, read from a text that comes in pieces.

A value's text does not tell ``"12"`` from ``12``. The type that the function declares for the parameter decides; a
value without one, or that is not of this type, is text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from chat.arguments import refuse_constant
from chat.events import CallArguments, CallStart, Event
from chat.reading_hermes import TaggedCalls
from chat.turns import Tool

_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>\n?(.*?)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>(?=\s*(?:<parameter=[^>\n]+>|\Z))", re.DOTALL)
_PARAMETER_START, _PARAMETER_END = "<parameter=", "</parameter>"
_PYTHON = {"True": True, "False": False, "None": None}
_CLASSES: Mapping[str, tuple[type, ...]] = {
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "object": (dict,),
    "array": (list,),
    "null": (type(None),),
}


def tagged_parameters(tools: Sequence[Tool], separator: str) -> TaggedCalls:
    """Return a parser of content and calls.

    Args:
        tools: functions that may be called, for the types of their parameters.
        separator: line ends between content and the first call.
    """
    declared = {name: types for name, types in map(_declared, tools) if name}
    return TaggedCalls(_parser(declared), _is_cut, separator)


def _parser(declared: Mapping[str, Mapping[str, list[str]]]) -> Callable[[str], list[Event]]:
    def parse(body: str) -> list[Event]:
        """Return the events of a call; nothing if it is malformed."""
        function = _FUNCTION.fullmatch(body)
        if function is None:
            return []
        name, text = function.groups()
        types, position, arguments = declared.get(name, {}), 0, {}
        while text[position:].strip():
            parameter = _PARAMETER.match(text, position)
            if parameter is None or parameter[1] in arguments:
                return []
            arguments[parameter[1]] = _value(parameter[2], types.get(parameter[1], []))
            position = parameter.end()
        return [CallStart(name), CallArguments(json.dumps(arguments, ensure_ascii=False))]

    return parse


def _is_cut(body: str) -> bool:
    return body.rfind(_PARAMETER_START) > body.rfind(_PARAMETER_END)


def _declared(tool: Tool) -> tuple[str, dict[str, list[str]]]:
    """Return a function's name, and the types that its schema declares for each parameter."""
    inner = tool.get("function")
    function = inner if isinstance(inner, dict) else tool
    schema = function.get("parameters")
    properties = schema.get("properties") if isinstance(schema, dict) else None
    name = function.get("name")
    types = {key: _types(value) for key, value in properties.items()} if isinstance(properties, dict) else {}
    return name if isinstance(name, str) else "", types


def _types(schema: Any) -> list[str]:
    if not isinstance(schema, dict):
        return []
    types = schema.get("type")
    found = [types] if isinstance(types, str) else list(types) if isinstance(types, list) else []
    choices = [
        choice for key in ("anyOf", "oneOf") for choice in schema.get(key) or () if isinstance(schema.get(key), list)
    ]
    return found + [type_ for choice in choices for type_ in _types(choice)]


def _value(text: str, types: Sequence[str]) -> Any:
    """Return the value of a parameter's text: of a declared type, else the text."""
    if not types or ("string" in types and "null" not in types):
        return text
    try:
        value = _PYTHON[text] if text in _PYTHON else json.loads(text, parse_constant=refuse_constant)
    except (ValueError, RecursionError):
        return text
    if "string" in types and value is not None:
        return text
    classes = tuple(class_ for type_ in types for class_ in _CLASSES.get(type_, ()))
    return value if isinstance(value, classes) and (not isinstance(value, bool) or bool in classes) else text
