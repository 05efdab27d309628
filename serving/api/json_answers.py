"""``response_format``: a finished answer is checked. Nothing forces a model to write JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from serving.api.errors import ApiError
from serving.api.schemas import ResponseFormat

_MOST_STEPS = 20_000  # of checking a schema's keywords: references can make a small schema take for ever
_FIELD = "response_format.json_schema.schema"
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
        return _schema_check(response_format.json_schema.schema_)
    if not any("json" in str(message.get("content")).lower() for message in messages):
        raise ApiError(400, "messages: json_object needs a message that asks for JSON, by this word", "messages")

    def check(text: str) -> None:
        if not isinstance(_parse(text), dict):
            raise _mismatch("it is not an object")

    return check


def _schema_check(schema: dict[str, Any] | bool) -> Check:
    from jsonschema import Draft202012Validator, SchemaError, ValidationError
    from jsonschema.exceptions import best_match
    from jsonschema.validators import extend
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    try:
        _refuse_keywords(schema)
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise ApiError(400, f"{_FIELD}: {error.message}", _FIELD) from None
    except RecursionError:
        raise ApiError(400, f"{_FIELD}: is nested too deeply", _FIELD) from None

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
            error = best_match(validator.iter_errors(_parse(text)))
        except RecursionError:
            raise _mismatch("checking it against the schema takes too many steps") from None
        except Unresolvable as unresolvable:
            raise ApiError(400, f"{_FIELD}: {unresolvable.ref} is not part of the schema", _FIELD) from None
        if error is not None:
            raise _mismatch(f"{error.json_path}: {error.message}")

    return check


def _refuse_keywords(value: Any, is_schema: bool = True) -> None:
    """Refuse keywords that cannot be checked safely, wherever they are in a schema.

    Args:
        is_schema: the keys of an object are keywords, not names of properties or definitions.
    """
    if isinstance(value, list):
        for item in value:
            _refuse_keywords(item)
    if not isinstance(value, dict):
        return
    for name, inner in value.items():
        if is_schema and name in _REFUSED:
            raise ApiError(400, f"{_FIELD}: the keyword {name} is not supported", _FIELD)
        if is_schema and name in ("$ref", "$dynamicRef") and not str(inner).startswith("#"):
            raise ApiError(400, f"{_FIELD}: {name} to something outside of the schema is not supported", _FIELD)
        if not (is_schema and name in _DATA):
            _refuse_keywords(inner, not (is_schema and name in _NAMES))


def _parse(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise _mismatch(f"it is not JSON ({error})") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no value of JSON")


def _mismatch(what: str) -> ApiError:
    message = (
        f"the model's answer does not have the response_format: {what}. Describe the format in a message, or ask again"
    )
    return ApiError(422, message, "response_format", "invalid_answer")
