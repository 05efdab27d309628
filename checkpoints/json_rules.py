"""Rules for values in a JSON file: their types, ranges and sizes. The rules of each file are in ``json_schemas``.

A rule looks at one value and describes what is wrong with it. Needs no torch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

Fault = str | None
"""A description of a fault in a value, with its place in the file; ``None`` if there is no fault."""


@dataclass(frozen=True)
class Rule:
    """A rule for one value.

    Attributes:
        what: the accepted values, as they complete "KEY is X, not ...".
        accepts: whether the value itself is accepted.
        find_inside: finds a fault inside an accepted list or object; its second argument is the value's place.
    """

    what: str
    accepts: Callable[[Any], bool]
    find_inside: Callable[[Any, str], Fault] | None = None

    def find_fault(self, value: Any, place: str) -> Fault:
        """Return the first fault of a value that stands at ``place``."""
        if not self.accepts(value):
            return f"{place} is {shown(value)}, not {self.what}"
        return None if self.find_inside is None else self.find_inside(value, place)


def shown(value: Any) -> str:
    """Return a value as JSON of at most 60 characters, for a message."""
    if isinstance(value, (list, dict)) and len(value) > 3:
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)} values"
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf


def whole(low: int, high: int) -> Rule:
    """A whole number in a closed range."""
    what = f"a whole number from {low:,} to {high:,}"
    return Rule(what, lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high)


def number(low: float, high: float) -> Rule:
    """A finite number in a closed range."""
    return Rule(f"a number from {low:,g} to {high:,g}", lambda value: _is_number(value) and low <= value <= high)


def text(most: int = 10_000) -> Rule:
    """A text without NUL."""
    return Rule(f"a text of at most {most:,} characters", lambda value: isinstance(value, str) and _fits(value, most))


def _fits(value: str, most: int) -> bool:
    return len(value) <= most and "\0" not in value


def matching(pattern: str, what: str, most: int = 200) -> Rule:
    """A text that a pattern matches as a whole."""
    compiled = re.compile(pattern)
    return Rule(
        what, lambda value: isinstance(value, str) and len(value) <= most and compiled.fullmatch(value) is not None
    )


def one_of(*values: Any) -> Rule:
    """One of a few values; ``true`` is not 1."""
    what = " or ".join(json.dumps(value) for value in values)
    return Rule(what, lambda value: any(type(value) is type(each) and value == each for each in values))


def either(*rules: Rule) -> Rule:
    """A value that one of the rules accepts; the first that does checks what is inside it."""

    def find_inside(value: Any, place: str) -> Fault:
        return next(rule for rule in rules if rule.accepts(value)).find_fault(value, place)

    return Rule(
        " or ".join(rule.what for rule in rules), lambda value: any(rule.accepts(value) for rule in rules), find_inside
    )


def list_of(rule: Rule, most: int = 10_000) -> Rule:
    """A list of values that follow a rule."""

    def find_inside(values: list[Any], place: str) -> Fault:
        faults = (rule.find_fault(value, f"{place}[{index}]") for index, value in enumerate(values))
        return next((fault for fault in faults if fault), None)

    return Rule(
        f"a list of at most {most:,}", lambda value: isinstance(value, list) and len(value) <= most, find_inside
    )


def mapping_of(rule: Rule, most: int = 10_000, key: Rule | None = None) -> Rule:
    """An object with any keys, or with keys that follow a rule, whose values follow a rule."""

    def find_inside(values: dict[str, Any], place: str) -> Fault:
        for name, value in values.items():
            if key is not None and not key.accepts(name):
                return f"{place} has the key {shown(name)}, not {key.what}"
            if fault := rule.find_fault(value, f"{place}.{_short(name)}"):
                return fault
        return None

    return Rule(
        f"an object of at most {most:,} keys", lambda value: isinstance(value, dict) and len(value) <= most, find_inside
    )


def table(
    rows: Mapping[str, Rule],
    required: Collection[str] = (),
    never_null: Collection[str] = (),
    find_contradiction: Callable[[Mapping[str, Any]], Fault] | None = None,
) -> Rule:
    """An object whose known keys follow a rule each; other keys are not looked at.

    Args:
        required: keys that must be present and not ``null``; ``null`` for any other key is as if it were missing.
        never_null: keys that may be missing, but must not be ``null``.
        find_contradiction: finds a fault among the values of several keys, once each is accepted.
    """

    def find_inside(values: dict[str, Any], place: str) -> Fault:
        prefix = f"{place}." if place else ""
        for name, rule in rows.items():
            value = values.get(name)
            if value is None and name in required and name not in values:
                return f"{prefix}{name} is missing"
            if value is None and not (name in values and (name in required or name in never_null)):
                continue
            if fault := rule.find_fault(value, prefix + name):
                return fault
        return None if find_contradiction is None else find_contradiction(values)

    return Rule("an object", lambda value: isinstance(value, dict), find_inside)


def _short(name: str) -> str:
    return name if len(name) <= 60 else f"{name[:57]}..."


BOOLEAN = Rule("true or false", lambda value: isinstance(value, bool))
ANY = Rule("a value", lambda value: True)
ANY_NUMBER = Rule("a number", lambda value: isinstance(value, (int, float)) and not isinstance(value, bool))
OBJECT = Rule("an object", lambda value: isinstance(value, dict))
TEXT = text()
ANY_TEXT = text(10_000_000)
IDENTIFIER = matching(r"[\w.\-]+", "a name of letters, digits, dots and dashes")
FILE_NAME = matching(r"(?!\.\.?$)[^/\\\0]+", "the name of a file in this folder", 255)
