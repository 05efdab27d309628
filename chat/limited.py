"""Running code that a checkpoint brings, such as its chat template, with limits on time and memory."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any, TypeVar

from errors import ConfigError, one_line

_SECONDS = 5  # of CPU time: enough for a chat template
_MEMORY = 512 * 2**20
# Far beyond the limit on CPU time, for a machine with much more to do.
_MOST_SECONDS = 120
_LOOK = 5.0  # seconds between two looks of a waiting process at whether its parent lives

Result = TypeVar("Result")


class LimitExceeded(Exception):
    """The code took too much time or memory, or it failed; the text says which."""


def run_limited(function: Callable[[], Result], seconds: int | None = None, memory: int = _MEMORY) -> Result:
    """Run a function in a forked process and return its result, which must be picklable and small.

    A process, because nothing within one can stop a loop in Python code and a huge string alike.

    Args:
        seconds: CPU time that the function may take; ``None`` for ``_SECONDS``.
        memory: bytes that it may allocate.

    Raises:
        ConfigError: raised by the function.
        LimitExceeded: it reached a limit, or raised any other error.
    """
    seconds = seconds or _SECONDS
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)
    process = _fork(_run, function, sender, seconds, memory)
    sender.close()
    kind: str
    value: Any
    try:
        kind, value = receiver.recv() if receiver.poll(_MOST_SECONDS) else ("limit", "")
    except EOFError:
        kind, value = "limit", ""
    finally:
        receiver.close()
        process.kill()
        process.join()
    return _result(kind, value, seconds, memory)


class LimitedProcess:
    """A forked process that calls a function for one request after the other, with the limits of each call.

    It is started by the first request, and again if it has died; it ends with this object and with its parent.

    Args:
        function: what it calls; requests and results must be picklable. What it writes to memory stays there.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function
        self._lock = threading.Lock()
        self._process: ForkProcess | None = None
        self._connection: Connection | None = None
        self._owner = 0

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # Processes that were forked after it keep its pipe open; one that is a copy of its parent must not end it.
        # At the end of the interpreter multiprocessing has ended it, as all daemons.
        if not is_finalizing() and self._process is not None and self._owner == os.getpid():
            self._end()

    def __call__(self, request: Any) -> Any:
        """Return the result for a request.

        Raises:
            ConfigError, LimitExceeded: as ``run_limited``.
        """
        with self._lock:
            is_new = self._process is None
            kind, value = self._ask(request)
            if kind == "died" and not is_new:
                # Others may have ended it, such as a signal to all processes of a group.
                kind, value = self._ask(request)
        return _result(kind, value, _SECONDS, _MEMORY)

    def _ask(self, request: Any) -> tuple[str, Any]:
        if self._connection is None:
            self._connection, other_end = multiprocessing.get_context("fork").Pipe()
            self._process = _fork(_serve, self._function, other_end, self._connection, os.getpid())
            self._owner = os.getpid()
            other_end.close()
        kind: str
        value: Any
        try:
            self._connection.send(request)
            kind, value = self._connection.recv() if self._connection.poll(_MOST_SECONDS) else ("died", "")
        except (EOFError, OSError):
            kind, value = "died", ""
        if kind in ("died", "limit"):
            self._end()
        return kind, value

    def _end(self) -> None:
        assert self._process is not None and self._connection is not None, "it has been started"
        self._connection.close()
        self._process.kill()
        self._process.join()
        self._process = self._connection = None


def _fork(target: Callable[..., None], *args: Any) -> ForkProcess:
    process = multiprocessing.get_context("fork").Process(target=target, args=args, daemon=True)
    with warnings.catch_warnings():
        # Python 3.12 warns that a fork does not copy the other threads; the function must not need them.
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    return process


def _result(kind: str, value: Any, seconds: int, memory: int) -> Any:
    """Return what a call returned, or raise what ended it."""
    if kind == "result":
        return value
    if kind == "config":
        raise ConfigError(value)
    raise LimitExceeded(value or f"takes more than {seconds} seconds or {memory // 2**20} MiB of memory")


def _run(function: Callable[[], object], sender: Connection, seconds: int, memory: int) -> None:
    """Run the function and send what came of it; a limit ends the process without a word."""
    _limit_memory(memory)
    _lower_limit(resource.RLIMIT_CPU, seconds)
    sender.send(_outcome(function))


def _serve(function: Callable[[Any], object], connection: Connection, other_end: Connection, parent: int) -> None:
    """Answer requests until the parent closes its end or dies."""
    other_end.close()
    for number in (signal.SIGINT, signal.SIGUSR1):  # a terminal and a scheduler send these to all processes
        signal.signal(number, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    _limit_memory(_MEMORY)
    while True:
        while not connection.poll(_LOOK):
            if os.getppid() != parent:
                return
        try:
            request = connection.recv()
        except EOFError:
            return
        usage = resource.getrusage(resource.RUSAGE_SELF)
        _lower_limit(resource.RLIMIT_CPU, int(usage.ru_utime + usage.ru_stime) + 1 + _SECONDS)
        connection.send(_outcome(partial(function, request)))


def _outcome(function: Callable[[], object]) -> tuple[str, object]:
    """Return the kind of what a call leads to, and the result or a message."""
    try:
        return "result", function()
    except MemoryError:
        return "limit", ""
    except ConfigError as error:
        return "config", str(error)
    except LimitExceeded as error:
        return "limit", str(error)
    except Exception as error:
        return "error", f"fails: {type(error).__name__}: {one_line(error)}"


def _limit_memory(memory: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if (size := _address_space()) is not None:
        _lower_limit(resource.RLIMIT_AS, size + memory)


def _lower_limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    most = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (most, hard))


def _address_space() -> int | None:
    """Return the bytes of address space that this process has; ``None`` where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (OSError, ValueError):
        return None
    return pages * resource.getpagesize()
