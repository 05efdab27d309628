"""Flags as data, and those of transformers' TrainingArguments read from its source.

Importing transformers' trainer takes seconds, reading its source twenty milliseconds: so ``--help`` and a wrong flag
are answered at once. A value is converted the same way wherever it comes from: command line, YAML or JSON.
"""

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
_WANTED = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "list": "a list of texts",
    "dict": "a JSON object",
    "str": "a text",
}


@dataclass(frozen=True)
class Flag:
    """One flag.

    Attributes:
        kinds: what a value may be, of ``bool int float str list dict``.
        default: the value where none is given; for the help and the record of a run.
        choices: the texts it may be, where they are known.
        optional: whether it may be ``None``.
        bare: the value of the flag without one; ``None`` where it needs one.
    """

    name: str
    kinds: frozenset[str]
    default: Any = None
    help: str = ""
    choices: tuple[str, ...] = ()
    optional: bool = False
    bare: Any = None

    @property
    def wanted(self) -> str:
        """What a value has to be, in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        return " or ".join(words for kind, words in _WANTED.items() if kind in self.kinds)

    def convert(self, value: Any) -> Any:
        """A value as the run uses it, from a text, a list of texts or what a file holds.

        Raises:
            ValueError: it does not fit; the message says what would.
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
            return value  # where "no" could be read as false
        for kind in ("bool", "int", "float", "dict", "str"):
            if kind in self.kinds:
                converted = _convert(kind, value)
                if converted is not None:
                    return self._choose(converted)
        if "list" in self.kinds and isinstance(value, str):
            return [value]
        raise ValueError(self._complaint(value))

    def _convert_list(self, values: list[Any]) -> Any:
        if "list" not in self.kinds or not all(isinstance(value, str) for value in values):
            raise ValueError(self._complaint(values))
        return values[0] if len(values) == 1 and "str" in self.kinds else list(values)

    def _choose(self, value: Any) -> Any:
        if self.choices and isinstance(value, str) and value not in self.choices:
            raise ValueError(self._complaint(value))
        return value

    def _complaint(self, value: Any) -> str:
        near = nearest(value, self.choices) if isinstance(value, str) else None
        hint = f"; the nearest is {near}" if near else ""
        return f"no such value{hint}" if hint and len(self.choices) > 12 else f"{self.wanted} is wanted{hint}"


def _convert(kind: str, value: Any) -> Any:
    """The value as this kind, or ``None`` where it is none."""
    if kind == "bool":
        text = str(value).lower() if isinstance(value, str | bool) else ""
        return True if text in _TRUE else False if text in _FALSE else None
    if kind == "dict":
        return value if isinstance(value, dict) else _parse_object(value)
    if kind == "str":
        # A file's true is the text "true" (--resume_from_checkpoint); its numbers want quotation marks.
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
    """The known name that looks most like this one."""
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)


# -------------------------------------------------------------------------------------------------- from annotations


def flag_of(
    name: str,
    annotation: str | ast.expr,
    default: Any = None,
    help: str = "",
    enums: dict[str, tuple[str, ...]] | None = None,
) -> Flag:
    """A flag from a field's annotation, as text or parsed."""
    kinds, choices = set(), list[str]()
    tree = ast.parse(annotation, mode="eval").body if isinstance(annotation, str) else annotation
    for part in _union(tree):
        base = part.value if isinstance(part, ast.Subscript) else part
        kind = "none" if isinstance(base, ast.Constant) else ast.unparse(base)
        if kind == "Literal" and isinstance(part, ast.Subscript):
            choices += [value for value in _literals(part.slice) if isinstance(value, str)]
            kind = "str"
        elif kind in (enums or {}):
            choices += (enums or {})[kind]
            kind = "str"
        kinds.add(kind)
    known = frozenset(kinds & _WANTED.keys())
    return Flag(name, known, default, help, tuple(choices), "none" in kinds, True if "bool" in known else None)


def _union(node: ast.expr) -> Iterator[ast.expr]:
    """The members of ``A | B | None``."""
    if isinstance(node, ast.BinOp):
        yield from _union(node.left)
        yield from _union(node.right)
    else:
        yield node


def _literals(node: ast.expr) -> list[Any]:
    value = ast.literal_eval(node)
    return list(value) if isinstance(value, tuple) else [value]


def flags_of(declaration: Any) -> dict[str, Flag]:
    """The flags that a dataclass of ours declares: its fields, with ``help`` in their metadata."""
    return {
        field.name: flag_of(field.name, str(field.type), field.default, field.metadata["help"])
        for field in dataclasses.fields(declaration)
    }
