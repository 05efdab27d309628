"""Arguments of function calls as JSON text, written as Python's ``json`` does with other letters than ASCII kept."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn


def to_json(value: Any) -> str:
    """Return a value as JSON text."""
    return json.dumps(value, ensure_ascii=False)


def to_json_again(text: str) -> str:
    """Return a text that is JSON as its re-encoded value; other texts, and values that would lose data, as a string."""
    try:
        return to_json(parse_exactly(text))
    except (ValueError, RecursionError):
        return to_json(text)


def parse_exactly(text: str) -> Any:
    """Parse JSON text.

    Raises:
        ValueError: it is no JSON, or its value would lose data: keys that occur twice, numbers that are not finite.
    """
    return json.loads(text, object_pairs_hook=_object, parse_float=_float, parse_constant=_float)


def refuse_constant(name: str) -> NoReturn:
    """Raise ``ValueError`` for NaN and infinities, as ``parse_constant`` of ``json.loads``."""
    raise ValueError(f"{name} is not JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    decoded = dict(pairs)
    if len(decoded) < len(pairs):
        raise ValueError("duplicate key")
    return decoded


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("not a JSON number")
    return value
