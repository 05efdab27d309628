"""The part of Go's text/template that an Ollama template of this toolkit uses, as tests/nightly compares it with Go."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|\(|\)|:=|=|,|[^\s(),="]+')
_FUNCTIONS = {
    "eq": lambda one, other: one == other, "ne": lambda one, other: one != other, "gt": lambda one, other: one > other,
    "not": lambda value: not value, "len": len, "slice": lambda values, start: values[start:],
}  # fmt: skip


class PrintedJson(dict):
    """An object that prints itself as JSON, as Ollama's tools and arguments do; with the spaces of chat templates."""

    def __str__(self) -> str:
        return json.dumps(self, ensure_ascii=False)


def render(template: str, data: Mapping[str, Any]) -> str:
    """Return the text of a template for the fields of ``data``."""
    pieces = iter(re.split(r"\{\{(.*?) \}\}", template))
    nodes, _ = _parse(pieces)
    return _write(nodes, dict(data), {"$": dict(data)})


def _parse(pieces: Iterator[str]) -> tuple[list[tuple[str, Any]], str]:
    """Return nodes up to the ``end`` or ``else`` that closes a block, and that action."""
    nodes: list[tuple[str, Any]] = []
    while True:
        nodes.append(("text", next(pieces)))
        action = next(pieces, None)
        if action is None:
            return nodes, ""
        word, _, rest = action.strip().partition(" ")
        if word in ("end", "else"):
            return nodes, action.strip()
        if word in ("if", "range", "with"):
            nodes.append((word, _parse_block(pieces, rest)))
        else:
            nodes.append(("action", _TOKEN.findall(action)))


def _parse_block(pieces: Iterator[str], head: str) -> tuple[list[str], Any, Any]:
    body, closing = _parse(pieces)
    otherwise: Any = []
    if closing.startswith("else if "):
        otherwise = [("if", _parse_block(pieces, closing.removeprefix("else if ")))]
    elif closing == "else":
        otherwise, closing = _parse(pieces)
    return _TOKEN.findall(head), body, otherwise


def _write(nodes: Sequence[tuple[str, Any]], dot: Any, names: dict[str, Any]) -> str:
    return "".join(_write_node(kind, value, dot, names) for kind, value in nodes)


def _write_node(kind: str, value: Any, dot: Any, names: dict[str, Any]) -> str:
    if kind == "text":
        return str(value)
    if kind == "action":
        if len(value) > 2 and value[1] in (":=", "="):
            names[value[0]] = _value(value[2:], dot, names)
            return ""
        return str(_value(value, dot, names))
    head, body, otherwise = value
    if kind == "range":
        index, _, item, _, *expression = head
        texts = []
        for number, each in enumerate(_value(expression, dot, names) or ()):
            names |= {index: number, item: each}
            texts.append(_write(body, each, names))
        return "".join(texts)
    found = _value(head, dot, names)
    if not found:
        return _write(otherwise, dot, names)
    return _write(body, found if kind == "with" else dot, names)


def _value(tokens: Sequence[str], dot: Any, names: dict[str, Any]) -> Any:
    """Return the value of an expression: one operand, or a function with operands."""
    operands, rest = [], list(tokens)
    name = rest.pop(0) if rest[0] in (*_FUNCTIONS, "and", "or") else ""
    while rest:
        operands.append(_operand(rest, dot, names))
    if name == "and":
        return next((value for value in operands if not value), operands[-1])
    if name == "or":
        return next((value for value in operands if value), operands[-1])
    return _FUNCTIONS[name](*operands) if name else operands[0]


def _operand(rest: list[str], dot: Any, names: dict[str, Any]) -> Any:
    token = rest.pop(0)
    if token == "(":
        depth, inner = 1, []
        while depth:
            inner.append(rest.pop(0))
            depth += {"(": 1, ")": -1}.get(inner[-1], 0)
        return _value(inner[:-1], dot, names)
    if token[0] == '"' or re.fullmatch(r"-?\d+", token):
        return json.loads(token)
    if token in ("true", "false"):
        return token == "true"
    name, *fields = token.split(".")
    found = names[name] if name else dot
    for field in filter(None, fields):
        found = found.get(field)
    return "" if found is None else found
