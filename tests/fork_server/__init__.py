"""A server that forks Python processes for tests, because importing torch and transformers takes 8 s of a core.

``python()`` is an executable with the interface of the interpreter. The process it stands for is forked from a process
of this test session that has imported the libraries, but no module of this repository, and then runs the given script,
module or code with its own arguments, environment, streams, folder, limits and signals, until the interpreter ends as
usual. A new process runs instead if it would differ: with interpreter options, a terminal, or other values of variables
that libraries read on import. torchrun starts its ranks with ``PYTHON_EXEC``, DeepSpeed and mpirun do not.

Tests use ``sys.executable`` where the start of a process matters: what is imported, printed or measured during it.
``FORK_SERVER=0`` makes all processes new ones.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from tests.golden import REPO, offline_environment

HERE = Path(__file__).parent


def environment() -> dict[str, str]:
    """Return the environment of commands: offline, on the CPU so that results are the same everywhere, and with threads
    that sleep while they wait, because spinning threads starve each other on a busy machine."""
    return {**offline_environment(), "OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": ""}


@contextmanager
def restored_environment() -> Iterator[None]:
    """Restore the environment after a command in this process: commands and libraries set variables for themselves,
    which processes that are started later would inherit."""
    before = dict(os.environ)
    try:
        yield
    finally:
        if os.environ != before:
            os.environ.clear()
            os.environ |= before


# As it is before any test changes it.
_ENVIRONMENT = environment()


@cache
def python() -> str:
    """Return the executable, after starting the server at the first call."""
    if not hasattr(os, "pidfd_open") or os.environ.get("FORK_SERVER") == "0":
        return sys.executable
    folder = Path(tempfile.mkdtemp(prefix="fork-", dir="/tmp"))  # the path of a socket has 107 bytes at most
    address, log = folder / "socket", folder / "log"
    with log.open("w") as file:
        server = subprocess.Popen(
            [sys.executable, HERE / "server.py", address, sys.executable],
            env={name: value for name, value in _ENVIRONMENT.items() if name != "PYTHONPATH"},
            stdin=subprocess.PIPE, stdout=file, stderr=file,
        )  # fmt: skip

    def end() -> None:
        assert server.stdin is not None
        server.stdin.close()
        server.wait()

    atexit.register(end)
    executable = folder / "python"
    words = [sys._base_executable, "-IS", HERE / "client.py", address, sys.executable]
    quoted = " ".join("'{}'".format(str(word).replace("'", "'\\''")) for word in words)
    executable.write_text(f'#!/bin/sh\nexec {quoted} "$@"\n')
    executable.chmod(0o755)
    while not address.exists():
        assert server.poll() is None, log.read_text()
    return str(executable)


def link_checkout(folder: Path, without: Sequence[str] = ()) -> None:
    """Fill ``folder`` with links to this checkout, and a ``.venv`` whose interpreter is ``python()``.

    Args:
        without: names that are left out, besides those of results.
    """
    for path in REPO.iterdir():
        if path.name not in (".git", ".venv", "output", "build", "runs", *without):
            (folder / path.name).symlink_to(path)
    environment = folder / ".venv"
    (environment / "bin").mkdir(parents=True)
    for path in (*Path(sys.prefix).iterdir(), *Path(sys.prefix, "bin").iterdir()):
        if path.name != "bin":
            (environment / path.relative_to(sys.prefix)).symlink_to(path)
    for path in (environment / "bin").glob("python*"):
        path.unlink()
        path.symlink_to(python())


def process_of(client: int) -> int:
    """Return the id of the process that stands behind one of ``python()``; signals that cannot be caught need it."""
    path = Path(python()).parent / str(client)
    return int(path.read_text()) if path.exists() else client
