"""Packages in a folder of their own, without what they require: PYTHONPATH names it to a process."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from export.gguf_tools import CONVERTER, QUANTIZER
from tests.golden import REPO

GGUF_TOOLS = ".venv-gguf-tools"


def install_apart(name: str, *packages: str, contents: str = "") -> Path:
    """Return the folder of packages, after installing them if it has others.

    Args:
        name: of a folder in the repository, which git ignores.
        packages: pip's arguments.
        contents: of a requirements file among them.
    """
    folder = REPO / name
    folder.mkdir(exist_ok=True)
    wanted = f"{sys.version_info[:2]} {packages} {contents}"
    stamp, target = folder / "installed", folder / "packages"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.is_file() or stamp.read_text() != wanted:
            stamp.unlink(missing_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
            result = subprocess.run([*command, "--no-compile", "--target", target, *packages])
            if result.returncode != 0:
                _miss(f"NOT TESTED with {' '.join(packages)}: pip cannot install it")
            stamp.write_text(wanted)
    return target


def converter() -> Path:
    """Return a folder with llama.cpp's converter, 0.4 MB."""
    return install_apart(GGUF_TOOLS, *CONVERTER)


def converter_and_library() -> Path:
    """Return a folder with llama.cpp's converter and library: that in ``GGUF_TOOLS``, or one compiled in minutes."""
    if given := os.environ.get("GGUF_TOOLS"):
        return Path(given)
    return install_apart(f"{GGUF_TOOLS}-q4", *CONVERTER, *QUANTIZER)


def _miss(reason: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
