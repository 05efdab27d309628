"""transformers 4.57 in a folder of its own, which a process reads before the libraries of this environment.

    python -m tests.older_transformers     # make it now, rather than in the first test that needs it

It holds four packages without what they require: torch and the rest are this environment's. The gguf package is beside
them, which llama.cpp's converter reads and writes with, in just that version of transformers.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests.golden import REPO, offline_environment

REQUIREMENTS = REPO / "requirements_older_transformers.txt"
FOLDER = REPO / ".venv-older-transformers"


def install() -> Path:
    """Return the folder of the packages, after installing what the requirements list if it is not there."""
    FOLDER.mkdir(exist_ok=True)
    wanted = f"{sys.version_info[:2]} {REQUIREMENTS.read_text()}"
    stamp, packages = FOLDER / "installed", FOLDER / "packages"
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.is_file() or stamp.read_text() != wanted:
            stamp.unlink(missing_ok=True)
            shutil.rmtree(packages, ignore_errors=True)
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
            result = subprocess.run([*command, "--no-compile", "--target", packages, "-r", REQUIREMENTS])
            if result.returncode != 0:
                _miss("NOT TESTED in transformers 4.57: pip cannot install it")
            stamp.write_text(wanted)
    return packages


def _miss(reason: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def run_older(source: str, requests: Sequence[dict[str, Any]], folder: Path) -> Any:
    """Run Python source in a process with these packages.

    Args:
        source: reads ``requests`` from the file that is its first argument, and writes an answer to its second one.
        folder: the process's own, for both files.
    """
    (folder / "requests.json").write_text(json.dumps(requests))
    environment = offline_environment() | {"PYTHONPATH": str(install()), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", source, "requests.json", "answers.json"]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads((folder / "answers.json").read_text())


if __name__ == "__main__":
    os.environ.pop("PYTHONPATH", None)
    install()
