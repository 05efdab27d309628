"""Programs that a model has written, run in a process of their own with limits.

Limits keep a faulty program from harming the run; they are no protection from one that is meant to harm. A program has
the rights of the user who runs the evaluation, who has to allow it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

SECONDS = 10
MEMORY = 2 << 30
_FILE_BYTES, _FILES, _PROCESSES = 16 << 20, 64, 64
_WALL_SECONDS = 3 * SECONDS  # of a program that waits, or a machine that is busy

_START = """
import resource, runpy, sys
limits = [int(each) for each in sys.argv[1:]]
names = ("RLIMIT_CPU", "RLIMIT_AS", "RLIMIT_FSIZE", "RLIMIT_NOFILE", "RLIMIT_NPROC")
for name, limit in zip(names, limits):
    resource.setrlimit(getattr(resource, name), (limit, limit))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
sys.argv = ["program.py"]
runpy.run_path("program.py", run_name="__main__")
"""
# Namespaces of its own: no network but an unconfigured loopback, and no process outlives the first one.
_APART = ("unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child")


@cache
def isolation() -> tuple[str, ...]:
    """Return the command that takes the network from a program, if this machine has it and allows it."""
    try:
        done = subprocess.run([*_APART, "true"], capture_output=True, timeout=_WALL_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return _APART if done.returncode == 0 else ()


def passes(program: str, seconds: int = SECONDS, memory: int = MEMORY) -> bool:
    """Run a Python program, and return whether it comes to its end: without an error, an early exit or a limit.

    It runs in a temporary folder, which is removed, without this process's environment and its packages.

    Args:
        seconds: of processor time.
        memory: bytes of address space.
    """
    end = secrets.token_hex(16)
    limits = [seconds, memory, _FILE_BYTES, _FILES]
    if isolation():  # elsewhere all processes of the user count
        limits.append(_PROCESSES)
    command = [*isolation(), sys.executable, "-I", "-S", "-B", "-c", _START, *map(str, limits)]
    with tempfile.TemporaryDirectory(prefix="qwen-program-", ignore_cleanup_errors=True) as folder:
        Path(folder, "program.py").write_text(
            f"{program}\n\nprint()\nprint({end!r})\n", encoding="utf-8", errors="replace"
        )
        environment = {"HOME": folder, "TMPDIR": folder, "PATH": os.defpath, "LANG": "C.UTF-8"}
        with Path(folder, "output").open("w+b") as output:
            process = subprocess.Popen(
                command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(_WALL_SECONDS)
            except subprocess.TimeoutExpired:
                code = -signal.SIGKILL
            finally:
                _end(process)
            output.seek(max(0, output.seek(0, os.SEEK_END) - len(end) - 2))
            return code == 0 and output.read().split() == [end.encode()]


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a program and what it has started in its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
