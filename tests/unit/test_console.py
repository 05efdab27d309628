"""What commands write for people: escaped text, streams whose reader is gone, commands to type next."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from console import ROOT, pip_command, python_command, visible_lines
from tests.golden import REPO

# ----------------------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mb", "a␛[31mb"),
        ("a\nfinetune.py: error: forged", "a␊finetune.py: error: forged"),
        ("2 faults:\n  1. a\n  2. b", "2 faults:\n  1. a\n  2. b"),
        ("a\r\x07\x08\x7f\x00b", "a␍␇␈␡␀b"),
        ("\x9b31m \u202eevil \u2066x\u2069 \u2028", "\\x9b31m \\u202eevil \\u2066x\\u2069 \\u2028"),
        ("\udcd6\udcd0", "\\udcd6\\udcd0"),  # a GBK file name
        ("天地 é\t😀", "天地 é\t😀"),
    ],
)
def test_control_characters_are_shown(text: str, shown: str) -> None:
    assert visible_lines(text) == shown


# ------------------------------------------------------------------------------------------------------------- commands


def test_commands_name_the_interpreter_relative_to_the_current_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", str(ROOT / ".venv/bin/python"))
    monkeypatch.chdir(ROOT)
    ask = python_command("-m scripts.ask --model_name_or_path", Path("my model"), '"Who are you?"')
    assert ask == ".venv/bin/python -m scripts.ask --model_name_or_path 'my model' \"Who are you?\""
    assert python_command("finetune.py --help") == ".venv/bin/python finetune.py --help"
    assert pip_command("requirements_qlora.txt") == (
        ".venv/bin/python -m pip install -r requirements_qlora.txt -c constraints.txt"
    )
    assert pip_command("pyarrow") == ".venv/bin/python -m pip install pyarrow"


def test_commands_work_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shlex.split(pip_command("requirements_qlora.txt"))[-3:] == [
        str(ROOT / "requirements_qlora.txt"), "-c", str(ROOT / "constraints.txt")
    ]  # fmt: skip
    for command in (python_command("-m scripts.ask --help"), python_command("finetune.py --help")):
        result = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
        assert result.returncode == 0 and result.stdout.startswith("usage: "), command


# -------------------------------------------------------------------------------------------------------------- streams

COMMAND = """
import json, logging, os, sys
from commands import run_command, set_up_logging
def main(argv):
    set_up_logging()
    for number in range(2000):
        print("result", number, "天\\udcd6")
        logging.getLogger("finetune").info("line %d 天", number)
    sys.stdout.flush()
    from tqdm import tqdm
    for _ in tqdm(range(3), mininterval=0): pass
    with open(argv[0], "w") as file:
        json.dump([file.fileno(), os.path.exists("/dev/fd/1"), os.path.exists("/dev/fd/2")], file)
    return int(argv[1])
run_command(main, "tune.py", prints_result=len(sys.argv) > 3)
"""


def run_with(tmp_path: Path, *arguments: str, redirect: str = "", **environment: str) -> tuple[int, str]:
    """Run the command above through a shell; return its exit code and what reached the shell's stderr."""
    words = [sys.executable, "-c", COMMAND, str(tmp_path / "done"), *arguments]
    result = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {shlex.join(words)} {redirect}"],
        env={**os.environ, "PYTHONPATH": str(REPO), **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return result.returncode, result.stderr


@pytest.mark.parametrize("redirect", ["2>&1 | true", "| head -1 >/dev/null", ">&- 2>&-", "2>&-", ">/dev/full 2>&1"])
@pytest.mark.parametrize("code", ["0", "1"])
def test_output_that_nobody_reads_changes_nothing(tmp_path: Path, redirect: str, code: str) -> None:
    returned, stderr = run_with(tmp_path, code, redirect=redirect)
    assert returned == int(code)
    assert "Traceback" not in stderr and "Exception ignored" not in stderr
    descriptor, *are_open = json.loads((tmp_path / "done").read_text())
    assert descriptor > 2 and are_open == [True, True]


def test_a_result_that_a_full_disk_loses_is_a_failure(tmp_path: Path) -> None:
    code, stderr = run_with(tmp_path, "0", "result", redirect=">/dev/full")
    assert code == 1
    assert stderr.splitlines()[-1].startswith("tune.py: error: stdout cannot be written (No space left on device). ")
    assert run_with(tmp_path, "0", "result", redirect="| head -1 >/dev/null")[0] == 0


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}])
def test_a_terminal_without_the_characters_gets_escapes(tmp_path: Path, environment: dict[str, str]) -> None:
    code, stderr = run_with(tmp_path, "0", redirect=">&2", **environment)
    assert code == 0
    assert "\\udcd6" in stderr and "line 7 " in stderr and "Traceback" not in stderr


def test_a_deleted_folder_is_one_line(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    command = f"rmdir {gone}; {shlex.quote(sys.executable)} {REPO / 'finetune.py'} --use_lora"
    result = subprocess.run(["bash", "-c", command], cwd=gone, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "finetune.py: error: the current folder cannot be used (No such file or directory). Change to another folder\n"
    )
