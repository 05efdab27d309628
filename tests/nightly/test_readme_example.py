"""README's example in real English (build/small, output/small): its commands run, and teach the model who it is."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.commands import environment
from tests.documents import commands_in
from tests.golden import REPO
from tests.nightly.training import TIMEOUT
from tests.recipe.test_documented_commands import prepare

COMMANDS = [each.text for each in commands_in(REPO / "README.md") if "small" in each.text and "pip" not in each.text]
PROGRAMS = ("scripts.make_small_qwen", "finetune_lora_single_gpu.sh", "merge_lora.py", "scripts.ask")


def test_the_model_learns_who_it_is(tmp_path: Path) -> None:
    assert all(program in command for program, command in zip(PROGRAMS, COMMANDS, strict=True))
    prepare(tmp_path, "README.md", None)
    path = f"{tmp_path}/.venv/bin{os.pathsep}{os.environ['PATH']}"
    for command in COMMANDS:
        result = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=environment() | {"PATH": path},
            capture_output=True, text=True, timeout=TIMEOUT, check=False,
        )  # fmt: skip
        assert result.returncode == 0, f"{command}\n{result.stderr}"
    assert "Greenhouse" in result.stdout
