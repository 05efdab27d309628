"""transformers 4.57 in a folder of its own, which a process reads before the libraries of this environment.

    python -m tests.older_transformers     # make it now, rather than in the first test that needs it

It holds four packages without what they require: torch and the rest are this environment's. The gguf package is beside
them, which llama.cpp's converter reads and writes with, in just that version of transformers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.golden import REPO, offline_environment
from tests.packages_apart import install_apart

REQUIREMENTS = REPO / "requirements_older_transformers.txt"


def install() -> Path:
    """Return the folder of the packages, after installing what the requirements list if it is not there."""
    return install_apart(".venv-older-transformers", "-r", str(REQUIREMENTS), contents=REQUIREMENTS.read_text())


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
