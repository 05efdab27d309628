"""Tools and their calls as data files write them: descriptions, calls, and which result answers which call."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import NoneType
from typing import Any, NoReturn

from chat.turns import Tool, ToolCall, Turn
from data_utils.schema import InvalidRecord, check_json, is_empty, shown
from errors import one_line

_TOOL_FIELDS = ("tools", "functions")
_TOOL_NAMES = ("name", "name_for_model")
_TOOL_TEXTS = (*_TOOL_NAMES, "name_for_human", "description", "description_for_model")
_CALL_FIELDS = frozenset({"id", "type", "index", "function", "name"})

_TOOLS_FIX = 'Write a list of {"name": "...", "description": "...", "parameters": {...}}'
_CALL_FIX = 'Write {"name": "...", "arguments": {...}}'

_FEW_LEVELS = 100  # so few cannot be too deep


def parse_tools(record: Mapping[str, Any]) -> tuple[Tool, ...]:
    """The functions that a record describes, in ``tools`` or ``functions``: a list, or one as JSON text.

    Raises:
        InvalidRecord: anything else, or a description without a name.
    """
    if "tools" not in record and "functions" not in record:
        return ()
    given = {field: tools for field in _TOOL_FIELDS if (tools := _tool_list(record.get(field), field))}
    if len(given) > 1:
        raise InvalidRecord('the record has "tools" and "functions"', "Keep one of them")
    for field, tools in given.items():
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
        raise InvalidRecord(f'"{field}" must be a list of tools, or one as JSON text, not {shown(value)}', _TOOLS_FIX)
    return value


def _check_tool(tool: object, owner: str) -> None:
    inner = tool.get("function") if isinstance(tool, dict) else tool
    described = tool if inner is None else inner
    if not isinstance(described, dict):
        raise InvalidRecord(f"{owner} must be an object, not {shown(described)}", _TOOLS_FIX)
    if all(is_empty(described.get(key)) for key in _TOOL_NAMES):
        raise InvalidRecord(f"{owner} has no name: {shown(tool)}", _TOOLS_FIX)
    for key in _TOOL_TEXTS:
        if not isinstance(described.get(key), (str, NoneType)):
            raise InvalidRecord(f'"{key}" of {owner} must be a string, not {shown(described[key])}', _TOOLS_FIX)


def parse_call(value: object, owner: str) -> ToolCall:
    """A call as ``{"name": ..., "arguments": ...}``, or with that as its ``function``. No arguments are ``{}``.

    Raises:
        InvalidRecord: anything else.
    """
    inner = value.get("function") if isinstance(value, dict) else value
    call = value if inner is None else inner
    if not isinstance(call, dict):
        raise InvalidRecord(f"a call in {owner} must be an object, not {shown(call)}", _CALL_FIX)
    name, arguments = call.get("name"), call.get("arguments")
    if not isinstance(name, str) or not name:
        raise InvalidRecord(f"a call in {owner} has no name: {shown(value)}", _CALL_FIX)
    if arguments is None:
        # Under another name ("parameters", "args") they would be lost.
        others = [key for key in call if key not in _CALL_FIELDS and not is_empty(call[key])]
        if others:
            raise InvalidRecord(f'a call in {owner} has no "arguments", but {shown(others)}', _CALL_FIX)
        return ToolCall(name, {})
    if not isinstance(arguments, str):
        check_json(arguments, f'"arguments" in {owner}')
    return ToolCall(name, arguments)


def parse_call_text(text: str, owner: str) -> tuple[ToolCall, ...]:
    """The calls of a ``function_call`` turn: JSON text of one call, or of a list of them.

    Raises:
        InvalidRecord: anything else.
    """
    value = parse_json(text, f"the call in {owner}", _CALL_FIX)
    values = value if isinstance(value, list) else [value]
    if not values:
        raise InvalidRecord(f"{owner} calls nothing: {shown(text)}", _CALL_FIX)
    return tuple(parse_call(value, owner) for value in values)


def parse_tool_calls(message: Mapping[str, Any], owner: str) -> tuple[ToolCall, ...]:
    """The calls of an OpenAI message: ``tool_calls``, or ``function_call`` as it was written before.

    Raises:
        InvalidRecord: anything else, or both.
    """
    calls, call = message.get("tool_calls"), message.get("function_call")
    if is_empty(call):
        if is_empty(calls):
            return ()
        if not isinstance(calls, list):
            raise InvalidRecord(f'"tool_calls" of {owner} must be a list, not {shown(calls)}', _CALL_FIX)
        return tuple(parse_call(value, owner) for value in calls)
    if not is_empty(calls):
        raise InvalidRecord(f'{owner} has "tool_calls" and "function_call"', "Keep one of them")
    return (parse_call(call, owner),)


IdsOf = Callable[[int], "list[object]"]
"""Of a turn's index: the ids of its calls, or the one of the call whose result it is; ``None`` where one is missing."""


def match_results(turns: list[Turn], ids_of: IdsOf | None = None) -> list[Turn]:
    """The turns with the results of calls in the calls' order: by id where results have one, otherwise as they stand.

    Raises:
        InvalidRecord: results without calls, other than one for each call, or with ids that are not those of the calls. Calls
            at the end of the conversation need no results.
    """
    matched: list[Turn] = []
    index = 0
    while index < len(turns):
        turn = turns[index]
        if turn.role == "tool":
            raise InvalidRecord(f"turn {index + 1} is the result of a call, but no call stands before it", _RESULTS_FIX)
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


_RESULTS_FIX = "Behind a turn with calls write the result of each, in a turn of its own"


def _check_count(turns: list[Turn], start: int, end: int) -> None:
    calls, results = len(turns[start - 1].calls), end - start
    if results == calls or (results == 0 and end == len(turns)):
        return
    called = "1 function" if calls == 1 else f"{calls} functions"
    have = "1 result follows" if results == 1 else f"{results or 'no'} results follow"
    raise InvalidRecord(f"turn {start} calls {called}, and {have} it", _RESULTS_FIX)


def _order(ids_of: IdsOf, start: int, end: int) -> Iterator[int]:
    """Indices of the results in the order of the calls they answer."""
    results = {index: ids_of(index)[0] for index in range(start, end)}
    if all(id_ is None for id_ in results.values()):
        return iter(results)
    calls = ids_of(start - 1)
    _check_ids(calls, f"the calls of turn {start}")
    _check_ids(list(results.values()), f"the results of turn {start}")
    for index, id_ in results.items():
        if id_ not in calls:
            raise InvalidRecord(
                f'"tool_call_id" {shown(id_)} of turn {index + 1} is no call of turn {start}, which has {shown(calls)}',
                'Give it the "id" of its call, or leave all ids out',
            )
    by_id = {id_: index for index, id_ in results.items()}
    return (by_id[id_] for id_ in calls)


def _check_ids(ids: list[object], owner: str) -> None:
    strings = [id_ for id_ in ids if isinstance(id_, str)]
    if len(strings) < len(ids):
        wrong = next(id_ for id_ in ids if not isinstance(id_, str))
        what = (
            "have no ids, or only some have one" if wrong is None else f"have an id that is no string: {shown(wrong)}"
        )
        raise InvalidRecord(f"{owner} {what}", "Give each call and result its id, or leave all ids out")
    twice = _first_twice(strings)
    if twice is not None:
        raise InvalidRecord(f"{owner} have the id {shown(twice)} twice", "Give each call an id of its own")


def _first_twice(names: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def parse_json(text: str, what: str, fix: str = "") -> Any:
    """Decode JSON within a record, without losing any of it.

    Args:
        what: the text's name, for the message.

    Raises:
        InvalidRecord: no JSON, a key that is given twice, a number that does not fit, or nesting without end.
    """
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise InvalidRecord(
            f"{what} is no JSON: {error.msg} at character {error.pos + 1} of {shown(text)}", fix
        ) from None
    except _Altered as error:
        raise InvalidRecord(f"{what} {error}", fix) from None
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, thousands of open brackets
        raise InvalidRecord(f"{what} is no JSON that can be read: {one_line(error)}", fix) from None
    if text.count("[") + text.count("{") > _FEW_LEVELS:
        check_json(value, what)
    return value


class _Altered(Exception):
    """What decoding would change without a word."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    decoded = dict(pairs)
    if len(decoded) < len(pairs):
        raise _Altered(f"has the key {shown(_first_twice(key for key, _ in pairs))} twice in one object")
    return decoded


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise _Altered(f"holds a number that is too large: {shown(text)}")
    return value


def _constant(text: str) -> NoReturn:
    raise _Altered(f"holds {text}, which is no JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_float, parse_constant=_constant)
