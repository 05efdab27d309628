"""Parse tools and calls: descriptions of functions, calls of them, and the results that answer each call."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import NoneType
from typing import Any, NoReturn

from chat.turns import Tool, ToolCall, Turn
from data_utils.schema import InvalidRecord, check_json, is_empty, short_repr
from errors import one_line

_TOOL_FIELDS = ("tools", "functions")
_TOOL_NAMES = ("name", "name_for_model")
_TOOL_TEXTS = (*_TOOL_NAMES, "name_for_human", "description", "description_for_model")
_CALL_FIELDS = frozenset({"id", "type", "index", "function", "name"})

_TOOLS_FIX = 'Write a list of {"name": "...", "description": "...", "parameters": {...}}'
_CALL_FIX = 'Write {"name": "...", "arguments": {...}}'
_RESULTS_FIX = "After a turn with calls, write the result of each call in a turn of its own"

_SAFE_LEVELS = 100  # JSON with so few brackets cannot be nested too deep


def parse_tools(record: Mapping[str, Any]) -> tuple[Tool, ...]:
    """Return the functions that ``tools`` or ``functions`` of a record describe, as a list or as its JSON text.

    Raises:
        InvalidRecord: not such a list, both fields, or a description without a name.
    """
    if "tools" not in record and "functions" not in record:
        return ()
    lists = {field: tools for field in _TOOL_FIELDS if (tools := _tool_list(record.get(field), field))}
    if len(lists) > 1:
        raise InvalidRecord('the record has "tools" and "functions"', "Keep one of them")
    for field, tools in lists.items():
        for number, tool in enumerate(tools, 1):
            _check_tool(tool, f'tool {number} in "{field}"')
        return tuple(tools)
    return ()


def _tool_list(value: object, field: str) -> list[Any]:
    if isinstance(value, str):
        value = parse_json(value, f'"{field}"', _TOOLS_FIX) if value.strip() else None
    elif isinstance(value, list):
        check_json(value, f'"{field}"')
    if value is None:
        return []
    if not isinstance(value, list):
        what = f'"{field}" must be a list of tools, or one as JSON text, not {short_repr(value)}'
        raise InvalidRecord(what, _TOOLS_FIX)
    return value


def _check_tool(tool: object, owner: str) -> None:
    inner = tool.get("function") if isinstance(tool, dict) else tool
    description = tool if inner is None else inner
    if not isinstance(description, dict):
        raise InvalidRecord(f"{owner} must be an object, not {short_repr(description)}", _TOOLS_FIX)
    if all(is_empty(description.get(key)) for key in _TOOL_NAMES):
        raise InvalidRecord(f"{owner} has no name: {short_repr(tool)}", _TOOLS_FIX)
    for key in _TOOL_TEXTS:
        if not isinstance(description.get(key), (str, NoneType)):
            raise InvalidRecord(f'"{key}" of {owner} must be a string, not {short_repr(description[key])}', _TOOLS_FIX)


def parse_call(value: object, owner: str) -> ToolCall:
    """Parse a call: ``{"name": ..., "arguments": ...}``, or an object with that as ``function``.

    Missing arguments are read as ``{}``.

    Raises:
        InvalidRecord: the value is not a call.
    """
    inner = value.get("function") if isinstance(value, dict) else value
    call = value if inner is None else inner
    if not isinstance(call, dict):
        raise InvalidRecord(f"a call in {owner} must be an object, not {short_repr(call)}", _CALL_FIX)
    name, arguments = call.get("name"), call.get("arguments")
    if not isinstance(name, str) or not name:
        raise InvalidRecord(f"a call in {owner} has no name: {short_repr(value)}", _CALL_FIX)
    if arguments is None:
        # Arguments under another name ("parameters", "args") would be lost.
        others = [key for key in call if key not in _CALL_FIELDS and not is_empty(call[key])]
        if others:
            raise InvalidRecord(f'a call in {owner} has no "arguments", but {short_repr(others)}', _CALL_FIX)
        return ToolCall(name, {})
    if not isinstance(arguments, str):
        check_json(arguments, f'"arguments" in {owner}')
    return ToolCall(name, arguments)


def parse_call_text(text: str, owner: str) -> tuple[ToolCall, ...]:
    """Parse the text of a ``function_call`` turn: the JSON of one call, or of a list of calls.

    Raises:
        InvalidRecord: not such JSON, or an empty list.
    """
    value = parse_json(text, f"the call in {owner}", _CALL_FIX)
    values = value if isinstance(value, list) else [value]
    if not values:
        raise InvalidRecord(f"{owner} calls nothing: {short_repr(text)}", _CALL_FIX)
    return tuple(parse_call(value, owner) for value in values)


def parse_tool_calls(message: Mapping[str, Any], owner: str) -> tuple[ToolCall, ...]:
    """Parse the calls of an OpenAI message: ``tool_calls``, or the older ``function_call``.

    Raises:
        InvalidRecord: not calls, or both fields.
    """
    calls, call = message.get("tool_calls"), message.get("function_call")
    if is_empty(call):
        if is_empty(calls):
            return ()
        if not isinstance(calls, list):
            raise InvalidRecord(f'"tool_calls" of {owner} must be a list, not {short_repr(calls)}', _CALL_FIX)
        return tuple(parse_call(value, owner) for value in calls)
    if not is_empty(calls):
        raise InvalidRecord(f'{owner} has "tool_calls" and "function_call"', "Keep one of them")
    return (parse_call(call, owner),)


IdsOf = Callable[[int], "list[object]"]
"""Index of a turn -> the ids of its calls, or the id of the call that it answers; ``None`` for a missing id."""


def match_results(turns: list[Turn], ids_of: IdsOf | None = None) -> list[Turn]:
    """Return the turns with results in the order of their calls: matched by id if they have ids, otherwise unchanged.

    Calls at the end of the conversation may have no results.

    Raises:
        InvalidRecord: results without calls, another number of results than calls, or ids that do not match.
    """
    matched: list[Turn] = []
    index = 0
    while index < len(turns):
        turn = turns[index]
        if turn.role == "tool":
            raise InvalidRecord(f"turn {index + 1} is the result of a call, but no call precedes it", _RESULTS_FIX)
        matched.append(turn)
        index += 1
        if turn.calls:
            end = index
            while end < len(turns) and turns[end].role == "tool":
                end += 1
            _check_count(turns, index, end)
            order = _order(ids_of, index, end) if ids_of else range(index, end)
            matched += [turns[result] for result in order]
            index = end
    return matched


def _check_count(turns: list[Turn], start: int, end: int) -> None:
    calls, results = len(turns[start - 1].calls), end - start
    if results == calls or (results == 0 and end == len(turns)):
        return
    functions = "1 function" if calls == 1 else f"{calls} functions"
    follow = "1 result follows" if results == 1 else f"{results or 'no'} results follow"
    raise InvalidRecord(f"turn {start} calls {functions}, and {follow} it", _RESULTS_FIX)


def _order(ids_of: IdsOf, start: int, end: int) -> Iterator[int]:
    """Return the indices of the results in the order of the calls that they answer."""
    results = {index: ids_of(index)[0] for index in range(start, end)}
    if all(id_ is None for id_ in results.values()):
        return iter(results)
    calls = ids_of(start - 1)
    _check_ids(calls, f"the calls of turn {start}")
    _check_ids(list(results.values()), f"the results of turn {start}")
    for index, id_ in results.items():
        if id_ not in calls:
            raise InvalidRecord(
                f'"tool_call_id" {short_repr(id_)} of turn {index + 1} is not an id of the calls of turn {start}, '
                f"{short_repr(calls)}",
                'Give it the "id" of its call, or leave all ids out',
            )
    by_id = {id_: index for index, id_ in results.items()}
    return (by_id[id_] for id_ in calls)


def _check_ids(ids: list[object], owner: str) -> None:
    strings = [id_ for id_ in ids if isinstance(id_, str)]
    if len(strings) < len(ids):
        wrong = next(id_ for id_ in ids if not isinstance(id_, str))
        what = (
            "have no ids, or only some have one"
            if wrong is None
            else f"have an id that is not a string: {short_repr(wrong)}"
        )
        raise InvalidRecord(f"{owner} {what}", "Give each call and result its id, or leave all ids out")
    repeated = _first_repeated(strings)
    if repeated is not None:
        raise InvalidRecord(f"{owner} have the id {short_repr(repeated)} twice", "Give each call an id of its own")


def _first_repeated(names: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def parse_json(text: str, what: str, fix: str = "") -> Any:
    """Decode JSON text within a record, and refuse what decoding would change.

    Args:
        what: the text's name, for the message.

    Raises:
        InvalidRecord: not JSON, a repeated key, a number out of range, or nesting that is too deep.
    """
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise InvalidRecord(
            f"{what} is not JSON: {error.msg} at character {error.pos + 1} of {short_repr(text)}", fix
        ) from None
    except _LossyJson as error:
        raise InvalidRecord(f"{what} {error}", fix) from None
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, thousands of open brackets
        raise InvalidRecord(f"{what} cannot be read as JSON: {one_line(error)}", fix) from None
    if text.count("[") + text.count("{") > _SAFE_LEVELS:
        check_json(value, what)
    return value


class _LossyJson(Exception):
    """JSON that the decoder would accept but change."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    decoded = dict(pairs)
    if len(decoded) < len(pairs):
        raise _LossyJson(f"has the key {short_repr(_first_repeated(key for key, _ in pairs))} twice in one object")
    return decoded


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise _LossyJson(f"contains a number that is too large: {short_repr(text)}")
    return value


def _constant(text: str) -> NoReturn:
    raise _LossyJson(f"contains {text}, which is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_float, parse_constant=_constant)
