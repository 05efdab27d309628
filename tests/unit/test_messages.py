"""Rules for messages, checked in the sources: commands that they give name the Python that runs."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.golden import REPO
from tests.unit.test_imports import ALL_SOURCES, parse

BARE = re.compile(r"(?<![\w./-])(?:python3? (?:-m |\w+\.py)|pip install)")
# Where the functions are, and commands for readers of a published model, who have no checkout.
EXCEPT = {"console.py", "loading/opened_by.py"}


def texts_of(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and text of each string that is no docstring and no name or usage of a command."""
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(id(node.value))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Parser"):
            named = [keyword.value for keyword in node.keywords if keyword.arg in ("prog", "usage", "epilog")]
            skipped |= {id(value) for value in [*node.args, *named]}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node.lineno, node.value


def test_commands_in_messages_name_the_interpreter() -> None:
    """By ``console.python_command`` and ``console.pip_command``."""
    faults = []
    for path in ALL_SOURCES:
        name = path.relative_to(REPO).as_posix()
        if name not in EXCEPT and not name.startswith("benchmarks/"):
            faults += [f"{name}:{line}: {text}" for line, text in texts_of(parse(path)) if BARE.search(text)]
    assert faults == []
