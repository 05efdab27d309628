"""How a command starts and ends: its parser, its exit code, one line per failure."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import errno
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

from errors import ConfigError, DataError, RunError, Terminated, one_line

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


# How long a process of several waits to be ended for the fault that the first one reports as well.
_WAIT_FOR_FIRST = 15.0


# How long a process that fails tries to tell the others: who keeps their messages may be gone.
_TIME_TO_TELL = 5.0


# What gloo, NCCL and the store of torch.distributed say when another process is gone, and when it does not come.
_GONE = re.compile(
    r"closed by peer|reset by peer|broken pipe|connection refused|socket closed|remote process exited|recvvalue failed"
    r"|failed to recv|no route to host|connection was likely closed",
    re.IGNORECASE,
)


_NOT_COMING = re.compile(r"timed out waiting|collective operation timeout|socket timeout|wait timeout", re.IGNORECASE)


_GO_ON = "--resume_from_checkpoint auto goes on from what was saved"


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line, like every other fault. Give it ``prog`` as the user types it."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message}", f"{self.prog} --help lists the flags")


class _Command:
    """The command that this process runs: its name, what the process is called, and who is told when it fails."""

    name = "python"
    process = ""
    tell: Callable[[str], object] | None = None


def tell_failures(process: str, tell: Callable[[str], object]) -> None:
    """Have ``tell(message)`` called when the command of this process fails: others may be waiting for it.

    The message is empty where all processes know it. ``process`` is how this one is called then.
    """
    _Command.process, _Command.tell = process, tell


def end_from_thread(message: str) -> NoReturn:
    """End this process with a line and exit code 1, though its main thread may be waiting for ever."""
    _close_bars()
    _report(_Command.name, 1, f"error: {message}. {_GO_ON}")
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(1)


def run_command(main: Callable[[Sequence[str]], int | None], name: str) -> None:
    """Run ``main(argv)`` as the process's main function and exit with its code.

    Exit codes: what ``main`` returns (``None`` is 0), 2 for a ``ConfigError`` or ``DataError``, 1 for any other
    failure, 130 after Ctrl-C, 143 after SIGTERM. ``--debug`` among the arguments shows the traceback of a failure.
    """
    argv = sys.argv[1:]
    _Command.name, _Command.process, _Command.tell = name, "", None
    before = signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        code = main(argv)
    except (Exception, KeyboardInterrupt, Terminated) as error:
        code, message = _describe(error)
        is_shared = isinstance(error, (ConfigError, DataError)) and error.is_shared
        is_spoken_for = is_shared and os.environ.get("RANK", "0") != "0"
        if is_spoken_for or (code == 2 and os.environ.get("LOCAL_RANK", "0") != "0"):
            _tell_others("" if is_shared else message)
            _wait_for_first()
        # A launcher that ends all processes after the first failure does not cut the message off.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _close_bars()
        if any(argument in ("--debug", "--debug=True", "--debug=true") for argument in argv):
            traceback.print_exc()
        if not is_spoken_for:
            _report(name, code, message)
        _tell_others("" if is_shared else message)
    finally:
        signal.signal(signal.SIGTERM, before)
    if "torch.distributed" in sys.modules and os.environ.get("WORLD_SIZE", "1") != "1":
        _end_now(code or 0)
    sys.exit(code)


def _end_now(code: int) -> NoReturn:
    """End a process of several without taking the interpreter apart.

    gloo's threads can hold the last reference to a tensor of Python. One that lets go of it while the interpreter is
    taken apart gets no lock any more and aborts a run that went well (pytorch/pytorch#179291).
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _report(name: str, code: int, message: str) -> None:
    rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE", "1")
    if code > 128:
        if rank not in (None, "0"):  # the first process says it
            return
    elif rank is not None and (rank, size) != ("0", "1"):
        host = f" ({socket.gethostname()})" if os.environ.get("GROUP_WORLD_SIZE", "1") != "1" else ""
        name = f"{name} [{_Command.process or f'rank {rank}{host}'}]"
    print(f"{name}: {message}", file=sys.stderr, flush=True)


def _tell_others(message: str) -> None:
    """Once."""
    tell, _Command.tell = _Command.tell, None
    if tell is not None:
        teller = threading.Thread(target=tell, args=(message.removeprefix("error: "),), daemon=True)
        teller.start()
        # What all of them know, the others have to hear before they may find the first process gone.
        teller.join(_TIME_TO_TELL if message else _WAIT_FOR_FIRST)


def _raise_terminated(number: int, frame: FrameType | None) -> NoReturn:
    # Whoever asks twice asks for the same; cleaning up is not interrupted.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated


def _describe(error: BaseException) -> tuple[int, str]:
    """Exit code and line of a failure."""
    if isinstance(error, (KeyboardInterrupt, Terminated)):
        code, word = (130, "interrupted") if isinstance(error, KeyboardInterrupt) else (143, "terminated")
        return code, f"{word}. {error}" if str(error) else word
    if isinstance(error, (ConfigError, DataError)):
        return 2, f"error: {error}"
    if isinstance(error, RunError):
        return 1, f"error: {error}"
    if _is_out_of_memory(error):
        fix = (
            "Lower --per_device_train_batch_size (and raise --gradient_accumulation_steps by as much), shorten "
            "--model_max_length, or add --gradient_checkpointing"
        )
        return 1, f"error: out of memory ({one_line(error)}). {fix}"
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        return 1, f"error: cannot write {error.filename or 'a file'} ({error.strerror}). Free some space"
    if isinstance(error, RuntimeError) and (lost := _describe_lost(error)):
        return 1, f"error: {lost}. {_GO_ON}"
    what = f"{type(error).__name__}: {one_line(error)}" if str(error) else type(error).__name__
    return 1, f"error: unexpected {what}. --debug shows the traceback"


def _describe_lost(error: RuntimeError) -> str | None:
    """What a failed collective says of the other processes; ``None`` where it was something else."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return None
    if _GONE.search(str(error)):
        what = "another process of the run died, or its host is gone"
        return f"{what} ({one_line(error)}). Look at the first error among the lines of all processes"
    if _NOT_COMING.search(str(error)):
        what = "another process of the run hangs, is gone, or takes longer than --ddp_timeout"
        fix = "Look at the first error among the lines of all processes, or raise --ddp_timeout"
        return f"{what} ({one_line(error)}). {fix}"
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    # By name, because torch is not imported here. On the CPU torch raises a plain RuntimeError.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def _wait_for_first() -> None:
    """Under torchrun all processes of a machine find the same fault: the first reports it, the launcher ends the rest.

    A process that nobody ends is alone with its fault and reports it itself.
    """
    try:
        time.sleep(_WAIT_FOR_FIRST)
    except Terminated:
        sys.exit(143)


def _close_bars() -> None:
    """Progress bars leave the cursor behind them; the message gets a line of its own."""
    bars = getattr(sys.modules.get("tqdm"), "tqdm", None)
    for bar in list(getattr(bars, "_instances", ())):
        # One whose first drawing failed, as on a full disk that stderr goes to, cannot be closed.
        with contextlib.suppress(AttributeError, OSError):
            bar.close()
