"""Flags as data, and the conversion of their values: the same for a command line, YAML and JSON."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

_TRUE, _FALSE = ("true", "yes", "t", "y", "1"), ("false", "no", "f", "n", "0")
# Kinds of values, and their names in messages.
_KINDS = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "list": "a list of strings",
    "dict": "a JSON object",
    "str": "a string",
}


@dataclass(frozen=True)
class Flag:
    """One flag.

    Attributes:
        kinds: the kinds of its values: ``bool``, ``int``, ``float``, ``str``, ``list``, ``dict``.
        default: for the help and for the record of a run.
        lora_default: its default with ``--use_lora``, if that is another one.
        choices: its values, if it is limited to certain strings.
        optional: accepts ``None``.
        bare: the value of the flag without an argument; ``None`` if it requires one.
        hint: explains values of other versions or toolkits, in the message about a wrong value.
    """

    name: str
    kinds: frozenset[str]
    default: Any = None
    help: str = ""
    choices: tuple[str, ...] = ()
    optional: bool = False
    bare: Any = None
    lora_default: Any = None
    hint: str = ""

    @property
    def words(self) -> tuple[str, ...]:
        """The strings that it accepts, if it is limited to some."""
        return self.choices and (*self.choices, *(("true", "false") if "bool" in self.kinds else ()))

    @property
    def expected(self) -> str:
        """The accepted values, for messages."""
        if self.choices:
            return f"one of {', '.join(self.words)}"
        return " or ".join(title for kind, title in _KINDS.items() if kind in self.kinds)

    def convert(self, value: Any) -> Any:
        """Convert a string, a list of strings, or a value from a file.

        Raises:
            ValueError: not an accepted value; the message names those that are.
        """
        if self.optional and "str" not in self.kinds and isinstance(value, str) and value.lower() == "none":
            value = None
        if value is None:
            if self.optional or self.default is None:
                return None
            raise ValueError(self._complaint(value))
        if isinstance(value, list):
            return self._convert_list(value)
        if "str" in self.kinds and value == self.default:
            return value  # before "no" is read as false
        for kind in ("bool", "int", "float", "dict", "str"):
            if kind in self.kinds:
                converted = _convert(kind, value)
                if converted is not None:
                    return self._check_choice(converted)
        if "list" in self.kinds and isinstance(value, str):
            return [value]
        raise ValueError(self._complaint(value))

    def _convert_list(self, values: list[Any]) -> Any:
        if "list" not in self.kinds or not all(isinstance(value, str) for value in values):
            raise ValueError(self._complaint(values))
        return values[0] if len(values) == 1 and "str" in self.kinds else list(values)

    def _check_choice(self, value: Any) -> Any:
        if self.choices and isinstance(value, str) and value not in self.choices:
            raise ValueError(self._complaint(value))
        return value

    def _complaint(self, value: Any) -> str:
        near = nearest(value, self.choices) if isinstance(value, str) else None
        hint = did_you_mean(near)
        hint += f" ({self.hint})" if self.hint else ""
        return f"unknown value{hint}" if hint and len(self.choices) > 12 else f"expected {self.expected}{hint}"


def _convert(kind: str, value: Any) -> Any:
    """Return the value as this kind, or ``None`` if it is not of the kind."""
    if kind == "bool":
        text = str(value).lower() if isinstance(value, str | bool) else ""
        return True if text in _TRUE else False if text in _FALSE else None
    if kind == "dict":
        return value if isinstance(value, dict) else _parse_object(value)
    if kind == "str":
        # true in a file is the string "true" (for --resume_from_checkpoint); numbers must be quoted.
        return value if isinstance(value, str) else str(value) if isinstance(value, bool) else None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    if kind == "int" and isinstance(value, float):
        return None
    try:
        number = int(value) if kind == "int" else float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _parse_object(value: Any) -> dict[str, Any] | None:
    if not isinstance(value, str) or not value.lstrip().startswith("{"):
        return None
    try:
        parsed = json.loads(value)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error
    return dict(parsed)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the most similar known name; ``None`` if none is similar."""
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)


def did_you_mean(near: str | None) -> str:
    """Return a hint for the end of a message, with a leading space; empty without a similar name."""
    return f" (did you mean {near}?)" if near else ""


# -------------------------------------------------------------------------------------------------- from annotations


def flags_of(group: Any) -> dict[str, Flag]:
    """Return the flags of a dataclass: its fields, with ``help`` in their metadata."""
    return {
        field.name: flag_of(field.name, str(field.type), field.default, field.metadata["help"])
        for field in dataclasses.fields(group)
    }


def flag_of(
    name: str,
    annotation: str | ast.expr,
    default: Any = None,
    help: str = "",
    enums: dict[str, tuple[str, ...]] | None = None,
) -> Flag:
    """Build a flag from a field's annotation.

    Args:
        annotation: as text, or parsed.
        enums: values of the enum classes that annotations may name.
    """
    kinds, choices = set(), list[str]()
    tree = ast.parse(annotation, mode="eval").body if isinstance(annotation, str) else annotation
    for member in _union_members(tree):
        base = member.value if isinstance(member, ast.Subscript) else member
        kind = "none" if isinstance(base, ast.Constant) else ast.unparse(base)
        if kind == "Literal" and isinstance(member, ast.Subscript):
            choices += [value for value in _literals(member.slice) if isinstance(value, str)]
            kind = "str"
        elif kind in (enums or {}):
            choices += (enums or {})[kind]
            kind = "str"
        kinds.add(kind)
    known = frozenset(kinds & _KINDS.keys())
    return Flag(name, known, default, help, tuple(choices), "none" in kinds, True if "bool" in known else None)


def _union_members(node: ast.expr) -> Iterator[ast.expr]:
    """Yield A, B and None of ``A | B | None``."""
    if isinstance(node, ast.BinOp):
        yield from _union_members(node.left)
        yield from _union_members(node.right)
    else:
        yield node


def _literals(node: ast.expr) -> list[Any]:
    value = ast.literal_eval(node)
    return list(value) if isinstance(value, tuple) else [value]
