"""``--help`` of every command: quick, in plain text, and as wide as the terminal."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.golden import REPO, offline_environment

MODULES = [
    "finetune",
    "merge_lora",
    *(
        f"{folder}.{path.stem}"
        for folder in ("scripts", "benchmarks")
        for path in sorted((REPO / folder).glob("*.py"))
        if "def main(" in path.read_text(encoding="utf-8")
    ),
]
WIDTH = 70
# Prints the help of each module, and the heavy libraries that are imported by then.
SHOW = f"""
import contextlib, importlib, io, json, sys
helps, heavy = {{}}, []
for name in {MODULES!r}:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        importlib.import_module(name).main(["--help"])
    helps[name] = out.getvalue()
    heavy += [(name, module) for module in ("torch", "transformers", "peft") if sys.modules.pop(module, None)]
json.dump([helps, heavy], sys.stdout)
"""


@pytest.fixture(scope="module")
def shown() -> tuple[dict[str, str], list[list[str]]]:
    environment = offline_environment() | {"COLUMNS": str(WIDTH)}
    command = [sys.executable, "-c", SHOW]
    result = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=True)
    helps, heavy = json.loads(result.stdout)
    return helps, heavy


def test_help_imports_no_heavy_library(shown: tuple[dict[str, str], list[list[str]]]) -> None:
    """Except in the developers' script whose work is little more than these imports."""
    assert [module for module, _ in shown[1] if module != "scripts.make_tiny_qwen"] == []


@pytest.mark.parametrize("module", MODULES)
def test_help_is_plain_text_of_the_terminals_width(shown: tuple[dict[str, str], list[list[str]]], module: str) -> None:
    text = shown[0][module]
    assert text.startswith("usage: ") and "``" not in text and "['" not in text
    prose = [line for line in text.splitlines() if not line.startswith((" ", "usage: "))]
    wide = [line for line in prose if len(line) > WIDTH]
    assert not wide or module == "finetune", wide
