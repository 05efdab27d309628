"""Running code that a checkpoint brings, such as its chat template, with limits on time and memory."""

from __future__ import annotations

import multiprocessing
import resource
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from errors import ConfigError, one_line

_SECONDS = 5  # of CPU time: enough for a chat template
_MEMORY = 512 * 2**20
# Far beyond the limit on CPU time, for a machine with much more to do.
_MOST_SECONDS = 120

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
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(function, sender, seconds, memory), daemon=True)
    with warnings.catch_warnings():
        # Python 3.12 warns that a fork does not copy the other threads; the function must not need them.
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
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
    if kind == "result":
        return value  # type: ignore[no-any-return]
    if kind == "config":
        raise ConfigError(value)
    raise LimitExceeded(value or f"takes more than {seconds} seconds or {memory // 2**20} MiB of memory")


def _run(function: Callable[[], object], sender: Connection, seconds: int, memory: int) -> None:
    """Run the function and send what came of it; a limit ends the process without a word."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _lower_limit(resource.RLIMIT_CPU, seconds)
    if (size := _address_space()) is not None:
        _lower_limit(resource.RLIMIT_AS, size + memory)
    try:
        sender.send(("result", function()))
    except MemoryError:
        sender.send(("limit", ""))
    except ConfigError as error:
        sender.send(("config", str(error)))
    except LimitExceeded as error:
        sender.send(("limit", str(error)))
    except Exception as error:
        sender.send(("error", f"fails: {type(error).__name__}: {one_line(error)}"))


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
