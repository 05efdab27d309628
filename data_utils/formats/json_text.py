"""JSON within a record: text that is decoded without a change to its data, and null fields of typed tables."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any, NoReturn

from data_utils.schema import InvalidRecord, check_json, short_repr
from errors import one_line

_SAFE_LEVELS = 100  # JSON with so few brackets cannot be nested too deep


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
        raise _LossyJson(f"has the key {short_repr(first_repeated(key for key, _ in pairs))} twice in one object")
    return decoded


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise _LossyJson(f"contains a number that is too large: {short_repr(text)}")
    return value


def _constant(text: str) -> NoReturn:
    raise _LossyJson(f"contains {text}, which is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_float, parse_constant=_constant)


def first_repeated(names: Iterable[str]) -> str | None:
    """Return the first name that occurs a second time."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def without_nulls(value: Any) -> Any:
    """Return a value, checked by ``check_json``, without the null fields of its objects.

    A typed table gives every object all fields of its column, so that a null field was absent. Items of lists are kept,
    and so is the default of a JSON schema whose type may be null.
    """
    if isinstance(value, dict):
        return {
            name: without_nulls(item)
            for name, item in value.items()
            if item is not None or (name == "default" and _may_be_null(value))
        }
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _may_be_null(schema: dict[str, Any]) -> bool:
    choices = [choice.get("type") for name in ("anyOf", "oneOf") for choice in _objects(schema.get(name))]
    types = schema.get("type")
    return "null" in choices or (isinstance(types, list) and "null" in types) or schema.get("nullable") is True


def _objects(value: object) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
