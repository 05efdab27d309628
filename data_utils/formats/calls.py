"""Parse calls of functions, and match them with the results that answer them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from chat.turns import ToolCall, Turn
from data_utils.formats.json_text import first_repeated, parse_json, without_nulls
from data_utils.schema import (
    ARGUMENTS_NOT_OBJECTS,
    NULLS_LEFT_OUT,
    InvalidRecord,
    Notes,
    check_json,
    is_empty,
    short_repr,
)

_CALL_FIELDS = frozenset({"id", "type", "index", "function", "name", "arguments"})

_CALL_FIX = 'Write {"name": "...", "arguments": {...}}'
_RESULTS_FIX = "After a turn with calls, write the result of each call in a turn of its own"


def parse_call(value: object, owner: str, notes: Notes, is_decoded: bool = False) -> ToolCall:
    """Parse a call: ``{"name": ..., "arguments": ...}``, or an object with that as ``function``.

    Missing arguments, and an empty text, are read as ``{}``.

    Args:
        is_decoded: the value was JSON text in the record, so that its null fields are meant.

    Raises:
        InvalidRecord: the value is not a call, or its arguments are a text that is not JSON.
    """
    inner = value.get("function") if isinstance(value, dict) else value
    call = value if inner is None else inner
    if not isinstance(call, dict):
        raise InvalidRecord(f"a call in {owner} must be an object, not {short_repr(call)}", _CALL_FIX)
    name, arguments = call.get("name"), call.get("arguments")
    if not isinstance(name, str) or not name:
        raise InvalidRecord(f"a call in {owner} has no name: {short_repr(value)}", _CALL_FIX)
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        # Arguments under another name ("parameters", "args") would be lost.
        others = [key for key in call if key not in _CALL_FIELDS and not is_empty(call[key])]
        if others:
            raise InvalidRecord(f'a call in {owner} has no "arguments", but {short_repr(others)}', _CALL_FIX)
        return ToolCall(name, {})
    return ToolCall(name, _parse_arguments(arguments, f'"arguments" in {owner}', notes, is_decoded))


def _parse_arguments(arguments: Any, what: str, notes: Notes, keeps_nulls: bool) -> Any:
    """Return checked arguments: a JSON text as it is, any other value without the null fields of a typed table."""
    if isinstance(arguments, str):
        value, kept = parse_json(arguments, what, "Write the arguments as a JSON object"), arguments
    else:
        check_json(arguments, what)
        value = kept = arguments if keeps_nulls else without_nulls(arguments)
        if kept != arguments:
            notes.add(NULLS_LEFT_OUT)
    if not isinstance(value, dict):
        notes.add(ARGUMENTS_NOT_OBJECTS)
    return kept


def parse_call_text(text: str, owner: str, notes: Notes) -> tuple[ToolCall, ...]:
    """Parse the text of a turn that is a call: the JSON of one call, or of a list of calls.

    Raises:
        InvalidRecord: not such JSON, or an empty list.
    """
    value = parse_json(text, f"the call in {owner}", _CALL_FIX)
    values = value if isinstance(value, list) else [value]
    if not values:
        raise InvalidRecord(f"{owner} calls nothing: {short_repr(text)}", _CALL_FIX)
    return tuple(parse_call(value, owner, notes, is_decoded=True) for value in values)


def parse_tool_calls(message: Mapping[str, Any], owner: str, notes: Notes) -> tuple[ToolCall, ...]:
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
        return tuple(parse_call(value, owner, notes) for value in calls)
    if not is_empty(calls):
        raise InvalidRecord(f'{owner} has "tool_calls" and "function_call"', "Keep one of them")
    return (parse_call(call, owner, notes),)


class ReadTurn(NamedTuple):
    """A turn as read from a record.

    Attributes:
        number: of its entry in the record, from 1; of the last one if it is several entries.
        ids: of its calls, or of the call that it answers; ``None`` for a missing id. Empty: the format has no ids.
    """

    turn: Turn
    number: int
    ids: Sequence[object] = ()


def match_results(read: Sequence[ReadTurn]) -> list[Turn]:
    """Return the turns with results in the order of their calls: matched by id if they have ids, otherwise unchanged.

    Calls at the end of the conversation may have no results.

    Raises:
        InvalidRecord: results without calls, another number of results than calls, or ids that do not match.
    """
    matched: list[Turn] = []
    index = 0
    while index < len(read):
        caller = read[index]
        if caller.turn.role == "tool":
            what = f"turn {caller.number} is the result of a call, but no call precedes it"
            raise InvalidRecord(what, _RESULTS_FIX)
        matched.append(caller.turn)
        index += 1
        if caller.turn.calls:
            end = index
            while end < len(read) and read[end].turn.role == "tool":
                end += 1
            results = read[index:end]
            _check_count(caller, len(results), is_last=end == len(read))
            matched += (result.turn for result in _in_order(caller, results))
            index = end
    return matched


def _check_count(caller: ReadTurn, results: int, is_last: bool) -> None:
    calls = len(caller.turn.calls)
    if results == calls or (results == 0 and is_last):
        return
    functions = "1 function" if calls == 1 else f"{calls} functions"
    follow = "1 result follows" if results == 1 else f"{results or 'no'} results follow"
    raise InvalidRecord(f"turn {caller.number} calls {functions}, and {follow} it", _RESULTS_FIX)


def _in_order(caller: ReadTurn, results: Sequence[ReadTurn]) -> Iterator[ReadTurn]:
    """Return the results in the order of the calls that they answer."""
    ids = {result.number: result.ids[0] for result in results if result.ids}
    if all(id_ is None for id_ in ids.values()):
        return iter(results)
    _check_ids(caller.ids, f"the calls of turn {caller.number}")
    _check_ids(list(ids.values()), f"the results of turn {caller.number}")
    for number, id_ in ids.items():
        if id_ not in caller.ids:
            raise InvalidRecord(
                f'"tool_call_id" {short_repr(id_)} of turn {number} is not an id of the calls of turn '
                f"{caller.number}, {short_repr(list(caller.ids))}",
                'Give it the "id" of its call, or leave all ids out',
            )
    by_id = {result.ids[0]: result for result in results}
    return (by_id[id_] for id_ in caller.ids)


def _check_ids(ids: Sequence[object], owner: str) -> None:
    strings = [id_ for id_ in ids if isinstance(id_, str)]
    if len(strings) < len(ids):
        wrong = next(id_ for id_ in ids if not isinstance(id_, str))
        what = (
            "have no ids, or only some have one"
            if wrong is None
            else f"have an id that is not a string: {short_repr(wrong)}"
        )
        raise InvalidRecord(f"{owner} {what}", "Give each call and result its id, or leave all ids out")
    repeated = first_repeated(strings)
    if repeated is not None:
        raise InvalidRecord(f"{owner} have the id {short_repr(repeated)} twice", "Give each call an id of its own")
