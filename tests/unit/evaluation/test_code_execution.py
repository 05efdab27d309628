"""Programs of models pass only if they come to their end, and reach neither the network nor this process's secrets."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from evaluation.code_execution import isolation, passes
from evaluation.task_files import read_subjects
from evaluation.task_prompts import build_items, program_of
from tests.golden import REPO

BENCHMARKS = REPO / "tests" / "references" / "benchmarks"


def test_solutions_pass_and_others_do_not() -> None:
    items = build_items("humaneval", read_subjects("humaneval", BENCHMARKS), None, None, 0, False)
    programs = [program_of(item.fields, item.fields["canonical_solution"], False) for item in items]
    assert [passes(program) for program in programs] == [True, True]
    assert not passes(program_of(items[0].fields, "    return 3\n", False))


@pytest.mark.parametrize(
    "program",
    [
        "raise SystemExit(0)",
        "import os; os._exit(0)",
        "def f(:",
        "while True: pass",
        "x = bytearray(1 << 29)",
        "open('large', 'wb').write(bytes(1 << 25))",
        "import time; time.sleep(60)",
    ],
)
def test_a_program_that_leaves_early_or_exceeds_a_limit_fails(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluation.code_execution._WALL_SECONDS", 3)
    assert not passes(program, seconds=1, memory=1 << 28)


def test_a_program_sees_no_environment_no_packages_and_no_files_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_TEST", "x")
    assert passes("import os\nassert 'SECRET_OF_TEST' not in os.environ")
    assert passes("import os\nassert sorted(os.listdir('.')) == ['output', 'program.py']")
    assert not passes("import torch")


def test_a_program_has_no_network() -> None:
    if not isolation():
        pytest.skip("this machine has no namespaces of users")
    with socket.create_server(("127.0.0.1", 0)) as server:
        connect = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 5)"
        assert not passes(connect)
        assert passes(f"try:\n    {connect.replace(chr(10), chr(10) + '    ')}\nexcept OSError:\n    pass")


def test_nothing_that_a_program_started_outlives_it(tmp_path: Path) -> None:
    """Without namespaces a process that leaves the program's group does."""
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(2); open({str(mark)!r}, 'w')"
    away = ", start_new_session=True" if isolation() else ""
    assert passes(f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}]{away})")
    time.sleep(3)
    assert not mark.exists()
