"""A server as a process of a benchmark."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
START_SECONDS = 600


class RefusedError(Exception):
    """A server that ended before it could be asked; the reason it gave."""


class Running(NamedTuple):
    """A server that answers; ``group`` is the group of its processes."""

    port: int
    group: int


@contextmanager
def server_process(command: Sequence[str], variables: Mapping[str, str]) -> Iterator[Running]:
    """Run a server, in a group of processes of its own, until the block ends.

    Args:
        command: ``--port`` and a free port are added to it; ``/health`` says whether the server answers.
        variables: of the environment, beside the present ones.

    Raises:
        RefusedError: it ended instead.
    """
    port = _free_port()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port)], cwd=ROOT, env={**os.environ, **variables},
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            _wait(process, port, log)
            yield Running(port, process.pid)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGCONT)
                process.terminate()
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


def _wait(process: subprocess.Popen[Any], port: int, log: Any) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            log.seek(0)
            raise RefusedError(reason_of(log.read()))
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:  # also an answer that is not 200
            time.sleep(0.5)
    log.seek(0)
    raise RuntimeError(f"the server does not answer after {START_SECONDS} s:\n{log.read()[-3000:]}")


def reason_of(log: str) -> str:
    """Return the message of the error that ended a server, the first one at the end of a traceback in its log."""
    lines = [re.sub(r"^\(\w+ pid=\d+\) (?:ERROR [^\]]+\] )?", "", line) for line in log.splitlines()]
    for number, line in enumerate(lines):
        if re.match(r"[\w.]+Error: ", line):
            # pydantic's message continues on the next line.
            message = lines[number + 1].strip() if "validation error for" in line else line
            return message.partition(" [type=")[0]
    return log.strip()[-500:]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
