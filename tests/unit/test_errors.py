"""Texts of exceptions, and what importing them costs."""

from __future__ import annotations

import subprocess
import sys

from errors import ConfigError, DataError, numbered, one_line
from tests.golden import REPO


def test_error_names_place_value_and_fix() -> None:
    assert str(ConfigError("--x 1 is not possible", "Use 2")) == "--x 1 is not possible. Use 2"
    assert str(DataError("a:1", "no turns", "Remove it")) == "a:1: no turns. Remove it"


def test_numbered_list_of_errors() -> None:
    errors = [DataError("a:1", "no turns"), ConfigError("--x 1", "Give 2")]
    assert numbered("2 errors", errors) == "2 errors:\n  1. a:1: no turns\n  2. --x 1. Give 2"


def test_text_of_a_library_error_becomes_one_short_line() -> None:
    assert one_line(ValueError("two\n  lines")) == "two lines"
    assert len(one_line(ValueError("x" * 1000))) == 300


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, commands; print({'torch', 'transformers', 'numpy', 'tqdm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
