"""Limits on the length of files and functions, so that each can be read at once."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from tests.golden import REPO
from tests.unit.test_imports import ALL_SOURCES, parse

MOST_LINES_OF_FILE = 450
MOST_LINES_OF_MEDIAN_FILE = 150
MOST_LINES_OF_FUNCTION = 60
# They keep the layout of transformers' models: one long forward pass with all its arguments.
LONG_FUNCTIONS = {("qwen_model/modeling_qwen.py", "forward")}

TESTS = sorted((REPO / "tests").rglob("*.py"))


def count_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def functions_in(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield name and number of lines of every function, decorators not included."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


def test_files_are_short() -> None:
    lines = {str(path.relative_to(REPO)): count_lines(path) for path in [*ALL_SOURCES, *TESTS]}
    assert {file: number for file, number in lines.items() if number > MOST_LINES_OF_FILE} == {}


def test_median_file_is_short() -> None:
    assert median(map(count_lines, ALL_SOURCES)) <= MOST_LINES_OF_MEDIAN_FILE


def test_functions_are_short() -> None:
    long = {
        (str(path.relative_to(REPO)), name)
        for path in [*ALL_SOURCES, *TESTS]
        for name, lines in functions_in(parse(path))
        if lines > MOST_LINES_OF_FUNCTION
    }
    assert long == LONG_FUNCTIONS


def test_lines_of_a_function_are_counted() -> None:
    source = "class A:\n    def f(self):\n        x = 1\n        return x\n\nasync def g(): pass"
    assert sorted(functions_in(ast.parse(source))) == [("f", 3), ("g", 1)]
