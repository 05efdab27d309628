"""scripts/setup_env.sh without network access: when it installs, when it does nothing, what it refuses."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.golden import REPO, offline_environment


def setup_env(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [shutil.which("dash") or "sh", str(REPO / "scripts" / "setup_env.sh"), *arguments],
        cwd=cwd,
        env={**offline_environment(), "PYTHON": sys.executable, "PIP_NO_INDEX": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    # pip is installed already, so installing it needs no network.
    (tmp_path / "base.txt").write_text("pip\n")
    (tmp_path / "all.txt").write_text("-r base.txt\n")
    (tmp_path / "pins.txt").write_text("")
    return tmp_path


def test_installs_once_and_again_after_a_change_of_requirements(folder: Path) -> None:
    arguments = ("env", "all.txt", "pins.txt")
    first = setup_env(*arguments, cwd=folder)
    assert first.returncode == 0, first.stderr
    assert "Creating env" in first.stdout and "Installing all.txt" in first.stdout
    assert (folder / "env" / "bin" / "python").exists()
    again = setup_env(*arguments, cwd=folder)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    for changed in ("base.txt", "pins.txt"):
        (folder / changed).write_text("pip\n# changed\n" if changed == "base.txt" else "# changed\n")
        updated = setup_env(*arguments, cwd=folder)
        assert updated.returncode == 0, updated.stderr
        assert "Installing all.txt" in updated.stdout and "Creating" not in updated.stdout
    assert setup_env(*arguments, cwd=folder).stdout == ""


@pytest.mark.long
def test_failed_installation_is_repeated(folder: Path) -> None:
    (folder / "all.txt").write_text("-r base.txt\n./not-there.whl\n")
    for _ in range(2):
        failed = setup_env("env", "all.txt", "pins.txt", cwd=folder)
        assert failed.returncode != 0
        assert "Installing all.txt" in failed.stdout
    # A broken environment, as after an interrupted creation, is created again.
    (folder / "env" / "bin" / "python").unlink()
    repaired = setup_env("env", "base.txt", "pins.txt", cwd=folder)
    assert repaired.returncode == 0, repaired.stderr
    assert "Creating env" in repaired.stdout


def test_unusable_arguments_are_refused(folder: Path) -> None:
    (folder / "mine").mkdir()
    (folder / "mine" / "notes.txt").write_text("keep me")
    for arguments, python, message in [
        (("mine", "all.txt", "pins.txt"), sys.executable, "mine is neither empty nor a virtual environment"),
        (("env", "missing.txt", "pins.txt"), sys.executable, "file missing.txt does not exist"),
        (("env", "all.txt", "pins.txt", "more"), sys.executable, "unexpected argument 'more'"),
        (("env", "all.txt", "pins.txt"), "/bin/false", "PYTHON=/bin/false is not a Python >= 3.10"),
    ]:
        result = setup_env(*arguments, cwd=folder, PYTHON=python)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith(f"setup_env.sh: error: {message}")
        assert result.stderr.count("\n") == 1
    assert sorted(path.name for path in folder.iterdir()) == ["all.txt", "base.txt", "mine", "pins.txt"]
    assert (folder / "mine" / "notes.txt").read_text() == "keep me"


def test_missing_python_is_reported(folder: Path) -> None:
    tools = folder / "bin"
    tools.mkdir()
    for tool in ("dirname", "cksum", "tr", "cat", "sed", "grep", "ls"):
        (tools / tool).symlink_to(shutil.which(tool) or tool)
    result = setup_env("env", "all.txt", "pins.txt", cwd=folder, PYTHON="", PATH=str(tools))
    assert result.returncode == 2
    assert result.stderr.startswith("setup_env.sh: error: no Python >= 3.10 with the venv module was found")
    assert not (folder / "env").exists()
