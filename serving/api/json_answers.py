"""``response_format`` and strict functions: what a model wrote is checked. Nothing forces it to write JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from chat.arguments import refuse_constant
from serving.api.errors import ApiError
from serving.api.schemas import ResponseFormat
from serving.requests import RequestError, shown

_LONGEST_PLACE = 200  # characters
_MOST_STEPS = 20_000  # of checking a schema's keywords: references can make a small schema take for ever
# Keywords with a regular expression, which can take for ever, too.
_REFUSED = ("pattern", "patternProperties")
# Keywords whose keys are names, not keywords.
_NAMES = ("properties", "$defs", "definitions", "dependentSchemas")
_DATA = ("const", "enum", "default", "examples")  # keywords with plain values

Check = Callable[[str], None]


def build_check(response_format: ResponseFormat | None, messages: Sequence[Mapping[str, Any]]) -> Check | None:
    """Return a function that raises ``ApiError`` for an answer that is not as asked; ``None`` if anything is.

    Raises:
        ApiError: a request that no answer can satisfy.
    """
    if response_format is None or response_format.type == "text":
        return None
    if response_format.json_schema is not None:
        field = "response_format.json_schema.schema"
        return _schema_check(response_format.json_schema.schema_, field, _answer_mismatch)
    if not any("json" in str(message.get("content")).lower() for message in messages):
        raise ApiError(400, "messages: json_object needs a message that asks for JSON, by this word", "messages")

    def check(text: str) -> None:
        if not isinstance(_parse(text, _answer_mismatch), dict):
            raise _answer_mismatch("it is not an object")

    return check


def build_call_checks(tools: Sequence[Mapping[str, Any]]) -> dict[str, Check]:
    """Return functions that raise ``ApiError`` for arguments that do not fit, by the names of the strict tools.

    Raises:
        ApiError: parameters that cannot be checked.
        RequestError: ``strict`` is no truth value.
    """
    checks: dict[str, Check] = {}
    for index, tool in enumerate(tools):
        function = tool.get("function")
        if not isinstance(function, Mapping) or function.get("strict") is None:
            continue  # the form of tools is checked where they are rendered
        place, name, strict = f"tools[{index}].function", function.get("name"), function["strict"]
        if not isinstance(strict, bool):
            raise RequestError(f"{place}.strict", f"must be true or false, not {shown(strict)}")
        if strict and isinstance(name, str):
            parameters, field = function.get("parameters", {}), f"{place}.parameters"
            if not isinstance(parameters, dict):
                raise RequestError(field, f"must be a JSON schema, as strict is true, not {shown(parameters)}")
            checks[name] = _schema_check(parameters, field, partial(_call_mismatch, name))
    return checks


def _schema_check(schema: dict[str, Any] | bool, field: str, mismatch: Callable[[str], ApiError]) -> Check:
    """Return a check of texts against a schema.

    Args:
        field: where the request has the schema.
        mismatch: builds the error of a text that does not fit, from the reason.
    """
    from jsonschema import Draft202012Validator, SchemaError, ValidationError
    from jsonschema.exceptions import best_match
    from jsonschema.validators import extend
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    try:
        _check_keywords(schema, field)
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise _schema_fault(field + error.json_path.removeprefix("$"), field, error.message) from None
    except _Refused as refused:
        raise _schema_fault(refused.place, field, str(refused)) from None
    except RecursionError:
        raise ApiError(400, f"{field}: is nested too deeply", field) from None

    def check(text: str) -> None:
        steps = iter(range(_MOST_STEPS))

        def bounded(keyword: Any) -> Any:
            def checked(*arguments: Any) -> Iterator[ValidationError]:
                if next(steps, None) is None:
                    raise RecursionError
                yield from keyword(*arguments) or ()

            return checked

        keywords = {name: bounded(function) for name, function in Draft202012Validator.VALIDATORS.items()}
        # An own registry retrieves nothing: without one, references are fetched from the network.
        validator = extend(Draft202012Validator, keywords)(schema, registry=Registry())
        try:
            error = best_match(validator.iter_errors(_parse(text, mismatch)))
        except RecursionError:
            raise mismatch("checking it against the schema takes too many steps") from None
        except OverflowError:
            raise mismatch("it has a number that is too large to be checked") from None
        except Unresolvable as unresolvable:
            raise ApiError(400, f"{field}: {unresolvable.ref} is not part of the schema", field) from None
        if error is not None:
            raise mismatch(f"{error.json_path}: {error.message}")

    return check


class _Refused(Exception):
    """A keyword that cannot be checked safely, at ``place``."""

    def __init__(self, place: str, what: str) -> None:
        super().__init__(what)
        self.place = place


def _schema_fault(place: str, field: str, what: str) -> ApiError:
    """Return the error of a schema, at its place in the request if that is short enough to be read."""
    shown_place = place if len(place) <= _LONGEST_PLACE else field
    return ApiError(400, f"{shown_place}: {what}", shown_place)


def _check_keywords(value: Any, place: str, is_schema: bool = True) -> None:
    """Raise ``_Refused`` for keywords that cannot be checked safely, wherever they are in a schema.

    Args:
        place: of the value in the request.
        is_schema: the keys of an object are keywords, not names of properties or definitions.
    """
    if isinstance(value, list):
        for index, item in enumerate(value):
            _check_keywords(item, f"{place}[{index}]")
    if not isinstance(value, dict):
        return
    for name, inner in value.items():
        if is_schema and name in _REFUSED:
            raise _Refused(place, f"the keyword {name} is not supported")
        if is_schema and name in ("$ref", "$dynamicRef") and not str(inner).startswith("#"):
            raise _Refused(place, f"{name} to something outside of the schema is not supported")
        if not (is_schema and name in _DATA):
            _check_keywords(inner, f"{place}.{name}", not (is_schema and name in _NAMES))


def _parse(text: str, mismatch: Callable[[str], ApiError]) -> Any:
    try:
        return json.loads(text, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise mismatch(f"it is not JSON ({error})") from None


def _call_mismatch(name: str, what: str) -> ApiError:
    message = f"the model's call of {name} does not fit its parameters: {what}. Describe them better, or ask again"
    return ApiError(422, message, "tools", "invalid_answer")


def _answer_mismatch(what: str) -> ApiError:
    message = (
        f"the model's answer does not have the response_format: {what}. Describe the format in a message, or ask again"
    )
    return ApiError(422, message, "response_format", "invalid_answer")
