"""Forked processes behave like new ones. ``test_arguments.py`` compares a run of finetune.py in both."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import fork_server
from tests.commands import environment, run
from tests.golden import REPO

EACH = pytest.mark.parametrize("is_new", [False, True], ids=["forked", "new"])


def start(code: str, is_new: bool, **settings: object) -> subprocess.Popen[str]:
    python = sys.executable if is_new else fork_server.python()
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([python, "-c", code], text=True, **{"env": environment(), **streams, **settings})  # type: ignore[call-overload]


def is_forked(**settings: object) -> bool:
    """Return whether torch is there before anything has imported it."""
    out, err = start("import sys; print('torch' in sys.modules)", False, **settings).communicate()
    assert out in ("True\n", "False\n"), err
    return out == "True\n"


STATE = """
import os, sys
print(sys.argv, sys.executable, sys.orig_argv, __name__, __file__, sys.path, os.getcwd(), os.umask(0))
print(sorted(pair for pair in os.environ.items() if pair[0] not in ("_", "PWD", "OLDPWD")))
print([name for name in sys.modules if name.partition(".")[0] in ("tests", "training", "commands", "console")])
print(sys.stdin.read(), sys.stdout.line_buffering, sys.stderr.line_buffering)
"""


@pytest.mark.parametrize("kind", ["script", "module"])
def test_a_process_sees_its_own_arguments_folder_environment_and_streams(tmp_path: Path, kind: str) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "state.py").write_text(STATE)
    (tmp_path / "link.py").symlink_to(tmp_path / "own" / "state.py")
    words = ["link.py"] if kind == "script" else ["-m", "own.state"]
    results = [
        subprocess.run(
            [python, *words, "--é", ""], cwd=tmp_path, env=environment() | {"PYTHONPATH": str(REPO), "MINE": "\udcff"},
            input="text", capture_output=True, text=True, umask=0o27, check=True,
        )
        for python in (sys.executable, fork_server.python())
    ]  # fmt: skip
    assert results[1].stdout == results[0].stdout
    assert results[1].stderr == ""


@EACH
@pytest.mark.parametrize(
    ("code", "status", "error"),
    [
        ("raise SystemExit(3)", 3, ""),
        ("raise SystemExit('why')", 1, "why\n"),
        ("raise ValueError('wrong')", 1, "ValueError: wrong\n"),
        ("import os; os._exit(4)", 4, ""),
        ("import os; os.abort()", -signal.SIGABRT, ""),
        ("raise KeyboardInterrupt", -signal.SIGINT, "KeyboardInterrupt\n"),
    ],
)
def test_a_process_ends_with_its_exit_code_or_signal(code: str, status: int, error: str, is_new: bool) -> None:
    process = start(code, is_new)
    assert process.communicate()[1].endswith(error)
    assert process.returncode == status


@EACH
def test_threads_exit_functions_and_buffers_are_finished(is_new: bool) -> None:
    code = (
        "import atexit, threading, time; atexit.register(lambda: print('exit'))\n"
        "threading.Thread(target=lambda: (time.sleep(0.1), print('thread'))).start(); print('main')"
    )
    assert start(code, is_new).communicate() == ("main\nthread\nexit\n", "")


@EACH
def test_signals_reach_the_process(is_new: bool) -> None:
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, lambda *_: print('got', flush=True))\n"
        "print(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN, flush=True); time.sleep(60)"
    )
    process = start(code, is_new, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    process.terminate()
    assert process.stdout.readline() == "got\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate()[0] == ""
    assert process.returncode == -signal.SIGINT


def test_a_process_dies_with_its_client() -> None:
    process = start("import os, time; print(os.getpid(), flush=True); time.sleep(60)", False)
    assert process.stdout is not None
    number = int(process.stdout.readline())
    assert fork_server.process_of(process.pid) == number != process.pid
    process.kill()
    process.communicate()
    until = time.monotonic() + 30
    while Path(f"/proc/{number}").exists():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_two_processes_draw_different_random_numbers() -> None:
    code = "import random, numpy, tempfile; print(random.random(), numpy.random.rand(), tempfile.mktemp())"
    first, second = (start(code, False).communicate()[0].split() for _ in range(2))
    assert not set(first) & set(second)


def test_a_new_process_runs_where_a_forked_one_would_differ() -> None:
    assert is_forked()
    assert not is_forked(env=environment() | {"TRANSFORMERS_VERBOSITY": "error"})
    assert not is_forked(env=environment() | {"PMIX_RANK": "1"})
    controller, terminal = os.openpty()
    assert not is_forked(stderr=terminal)
    os.close(controller), os.close(terminal)
    traced = run("-X", "importtime", "-c", "import sys; print('torch' in sys.modules)")
    assert traced.stdout == "False\n" and "import time:" in traced.stderr
