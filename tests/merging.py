"""Run merge_lora.py in the process of a test, with its exit code and output captured."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import merge_lora
from tests.commands import run_here


@dataclass(frozen=True)
class Merged:
    returncode: int
    stdout: str
    stderr: str


def merge(*arguments: object) -> Merged:
    with redirect_stdout(io.StringIO()) as stdout, redirect_stderr(io.StringIO()) as stderr:
        code = run_here(merge_lora.main, "merge_lora.py", arguments)
    return Merged(code, stdout.getvalue(), stderr.getvalue())


def merge_well(*arguments: object) -> Merged:
    result = merge(*arguments)
    assert result.returncode == 0, result.stderr
    return result


def message_of(result: Merged) -> str:
    """Return the error line of a refused or failed merge."""
    assert result.returncode in (1, 2) and result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr.splitlines()[-1]


def read(folder: Path, name: str = "config.json") -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / name).read_text())
    return value


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
