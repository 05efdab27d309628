"""Start and end of a command: argument parser, log lines, exit codes, one line per failure.

Every command reports a failure in one line (or a numbered list) that names the flag or ``file:line``, the value and the
fix. Exit codes: 2 refused, 1 failed, 130 and 143 interrupted. Imports nothing heavy, so that a wrong flag is refused
before torch is loaded.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import errno
import gc
import logging
import os
import re
import signal
import sys
import textwrap
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from console import (
    DISK_FULL,
    RED,
    RESET,
    LineHandler,
    lost_output,
    protect_streams,
    python_command,
    terminal_width,
    visible,
    visible_lines,
    wants_color,
)
from errors import ConfigError, DataError, RunError, Terminated, one_line
from processes import describe_process, has_several_processes, is_first, is_first_on_host

# Seconds that a rank waits to be terminated if rank 0 reports the same error.
_WAIT_FOR_FIRST = 15.0
# Seconds that a failing rank tries to notify the others: the process that hosts the store may be gone.
_NOTIFY_TIMEOUT = 5.0

_UNUSABLE_NAME = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR)
# Messages of gloo, NCCL and torch.distributed's store after another process has died, and after a time-out.
_PEER_LOST = re.compile(
    r"closed by peer|reset by peer|broken pipe|connection refused|socket closed|remote process exited|recvvalue failed"
    r"|failed to recv|no route to host|connection was likely closed",
    re.IGNORECASE,
)
_TIMED_OUT = re.compile(r"timed out waiting|collective operation timeout|socket timeout|wait timeout", re.IGNORECASE)
# What lowers the memory of any run; the values of the flags may follow their names.
LOWER_BATCH = "lower --per_device_train_batch_size{} (and raise --gradient_accumulation_steps{} by as much)"
LOWER_LENGTH, USE_LORA = "lower --model_max_length", "train an adapter with --use_lora"
_HOW_TO_RESUME = "--resume_from_checkpoint auto resumes from the last checkpoint"


class HelpFormatter(argparse.HelpFormatter):
    """Fills the paragraphs of a description to the terminal's width, and keeps indented ones, such as commands."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.replace("``", "").strip("\n").split("\n\n")
        return "\n\n".join(
            paragraph if paragraph.startswith(" ") else textwrap.fill(" ".join(paragraph.split()), width)
            for paragraph in paragraphs
        )


class CommandParser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line. ``prog`` is the command as the user types it."""

    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog, **{"formatter_class": HelpFormatter, **settings})

    def error(self, message: str) -> NoReturn:
        command = python_command(self.prog.removeprefix("python "))
        raise ConfigError(f"command line: {message}", f"{command} --help lists the flags")


@dataclass
class _Command:
    """State of the command that this process runs.

    Attributes:
        name: the command as the user types it.
        label: how error messages call this process, such as ``rank 1 (host-b)``; empty before ranks are known.
        notify: called with the error message when the command fails, because other ranks may be waiting.
    """

    name: str = "python"
    label: str = ""
    notify: Callable[[str], object] | None = None


_command = _Command()  # a process runs one command


def notify_on_failure(label: str, notify: Callable[[str], object]) -> None:
    """Call ``notify(message)`` if the command of this process fails: other ranks may be waiting for it.

    Args:
        label: how error messages call this process.
        notify: called with an empty message if every rank has raised the same error.
    """
    _command.label, _command.notify = label, notify


def abort_from_thread(message: str) -> NoReturn:
    """Report an error and end this process with exit code 1, even if its main thread is blocked."""
    _close_progress_bars()
    _report(1, f"error: {message}. {_HOW_TO_RESUME}")
    _flush_streams()
    os._exit(1)


def run_command(main: Callable[[Sequence[str]], int | None], name: str, *, prints_result: bool = False) -> None:
    """Run ``main(argv)`` as the main function of this process and exit with its code.

    Exit codes: the return value of ``main`` (``None`` is 0), 2 for a ``ConfigError`` or ``DataError``, 1 for any other
    failure, 130 after Ctrl-C, 143 after SIGTERM or after the terminal was closed (SIGHUP, unless started with nohup).
    ``--debug`` among the arguments prints the traceback of a failure.

    Output that nobody reads, or that a full disk loses, changes none of this, except with ``prints_result``.

    Args:
        prints_result: the command's result is what it prints to stdout, so it fails if that cannot be written.
    """
    protect_streams()
    _escape_lines()
    argv = sys.argv[1:]
    _command.name, _command.label, _command.notify = name, "", None
    previous_handlers = _handle_termination(_raise_terminated)
    try:
        _check_working_folder()
        code = main(argv)
        if prints_result and (lost := lost_output()):
            raise RunError(f"stdout cannot be written ({lost.strerror})", "Free some space, or print to another file")
    except (Exception, KeyboardInterrupt, Terminated) as error:
        code, message = _describe(error)
        is_shared = isinstance(error, (ConfigError, DataError)) and error.is_shared
        is_reported_by_first = is_shared and not is_first()
        if is_reported_by_first or (code == 2 and not is_first_on_host()):
            _notify_others("" if is_shared else message)
            _wait_for_first()
        # A launcher terminates all processes after the first failure; it must not cut this message off.
        _handle_termination(signal.SIG_IGN)
        _close_progress_bars()
        if any(argument in ("--debug", "--debug=True", "--debug=true") for argument in argv):
            print(visible(traceback.format_exc()), end="", file=sys.stderr)
        if not is_reported_by_first:
            _report(code, message)
        _notify_others("" if is_shared else message)
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
    if "torch.distributed" in sys.modules and has_several_processes():
        _exit_without_teardown(code or 0)
    sys.exit(code)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Import large packages in the block: the garbage collector does not run, and leaves out later what is imported.

    It would look through a million objects that stay, a quarter of the time of the imports and again in later steps.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def _check_working_folder() -> None:
    try:
        os.getcwd()
    except OSError as error:
        raise ConfigError(f"the current folder cannot be used ({error.strerror})", "Change to another folder") from None


def _exit_without_teardown(code: int) -> NoReturn:
    """Exit without finalising the interpreter, after running the ``atexit`` functions.

    gloo's threads can hold the last reference to a Python tensor. Releasing it while the interpreter is being finalised
    fails to acquire the lock and aborts a run that succeeded (pytorch/pytorch#179291).
    """
    atexit._run_exitfuncs()
    _flush_streams()
    os._exit(code)


def _flush_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def _report(code: int, message: str) -> None:
    name = _command.name
    if code > 128:
        if not is_first():  # every rank is interrupted; rank 0 reports it
            return
    elif label := describe_process():
        name = f"{name} [{_command.label or label}]"
    text = visible_lines(f"{name}: {message}")
    if wants_color(sys.stderr):
        text = text.replace(": error: ", f": {RED}error{RESET}: ", 1)
    print(text, file=sys.stderr, flush=True)


def _notify_others(message: str) -> None:
    """Notify the other ranks of a failure, at most once."""
    notify, _command.notify = _command.notify, None
    if notify is not None:
        thread = threading.Thread(target=notify, args=(message.removeprefix("error: "),), daemon=True)
        thread.start()
        # If all ranks share the error, the others must read the messages of rank 0 before it exits.
        thread.join(_NOTIFY_TIMEOUT if message else _WAIT_FOR_FIRST)


def _handle_termination(handler: Any) -> dict[int, Any]:
    """Set the handler of SIGTERM and, unless nohup has had it ignored, of SIGHUP; return the previous handlers."""
    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return {number: signal.signal(number, handler) for number in numbers}


def _raise_terminated(number: int, frame: FrameType | None) -> NoReturn:
    # A second signal must not interrupt the clean-up.
    _handle_termination(signal.SIG_IGN)
    raise Terminated


def _describe(error: BaseException) -> tuple[int, str]:
    """Return the exit code and the message of a failure."""
    if isinstance(error, (KeyboardInterrupt, Terminated)):
        code, word = (130, "interrupted") if isinstance(error, KeyboardInterrupt) else (143, "terminated")
        return code, f"{word}. {error}" if str(error) else word
    if isinstance(error, (ConfigError, DataError)):
        return 2, f"error: {error}"
    if isinstance(error, RunError):
        return 1, f"error: {error}"
    if is_out_of_memory(error):
        changes = [LOWER_BATCH.format("", ""), LOWER_LENGTH, USE_LORA]
        return 1, f"error: out of memory ({one_line(error)}). {memory_fix(changes)}"
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return 1, f"error: cannot write {error.filename or 'a file'} ({error.strerror}). Free some space"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        code = 2 if error.errno in _UNUSABLE_NAME else 1
        return code, f"error: {str(error.filename)[:300]}: {error.strerror}. Check the path and its permissions"
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        return 2, f"error: {error.object[:300]}: not valid Unicode. Rename the file, or correct the text"
    if isinstance(error, RuntimeError) and has_several_processes() and (lost := _describe_lost_process(error)):
        return 1, f"error: {lost}. {_HOW_TO_RESUME}"
    what = f"{type(error).__name__}: {one_line(error)}" if str(error) else type(error).__name__
    return 1, f"error: unexpected {what}. --debug shows the traceback"


def _describe_lost_process(error: RuntimeError) -> str | None:
    """Explain a failed collective by the state of the other processes; ``None`` for any other error."""
    if _PEER_LOST.search(str(error)):
        what = "another process of the run died, or its host is gone"
        return f"{what} ({one_line(error)}). See the first error in the output of all processes"
    if _TIMED_OUT.search(str(error)):
        what = "another process of the run hangs, died, or takes longer than --ddp_timeout"
        fix = "See the first error in the output of all processes, or raise --ddp_timeout"
        return f"{what} ({one_line(error)}). {fix}"
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error is of memory that does not suffice, on a device or on the host."""
    # By name, because torch is not imported here. On the CPU torch raises a plain RuntimeError.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def memory_fix(changes: Sequence[str]) -> str:
    """Return what to do about memory that does not suffice for a run.

    Args:
        changes: what lowers it, cheapest first.
    """
    *others, last = *changes, f"see what fits with {python_command('-m scripts.plan')}"
    fix = f"{', '.join(others)}, or {last}" if others else last
    return fix[0].upper() + fix[1:]


def _wait_for_first() -> None:
    """Wait to be terminated: usually all ranks of a host find the same error, and the first of them reports it.

    A rank that is not terminated in time is the only one with this error and reports it.
    """
    try:
        time.sleep(_WAIT_FOR_FIRST)
    except Terminated:
        sys.exit(143)


def _close_progress_bars() -> None:
    """Close tqdm's progress bars, which leave the cursor in their line, so that the message starts a new one."""
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    for bar in list(getattr(tqdm, "_instances", ())):
        # A bar whose first drawing failed, as with stderr on a full disk, cannot be closed.
        with contextlib.suppress(AttributeError, OSError):
            bar.close()


# ------------------------------------------------------------------------------------------------------------ log lines

_KNOWN_WARNINGS = (
    "'pin_memory' argument is set as true but no accelerator is found",  # the Trainer's default, harmless on a CPU
    "`is_gradient_checkpointing` is deprecated",  # peft calls transformers by an old name
    r"`torch\.distributed\.\w+` is deprecated",  # DeepSpeed and FSDP call torch by old names, at every step
    "`gradient_checkpointing",  # peft and the Trainer read the old name of transformers' flag, which still works
)

_KNOWN_LINES = {
    "DeepSpeed": "Setting accelerator",
    "accelerate.accelerator": "Gradient accumulation steps mismatch",  # the Trainer accumulates by itself
    # Delta nets without flash-linear-attention, which docs/training.md and the start of a run name.
    "transformers.integrations.hub_kernels": "is falling back to its reference PyTorch implementation",
}

# They warn on import, and once per layer, about other machines.
_NOISY_LOGGERS = ("torchao", "torch.utils._pytree", "bitsandbytes")


class _Without(logging.Filter):
    """Drop the lines that contain a text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def filter(self, record: logging.LogRecord) -> bool:
        return self.text not in str(record.msg)


class _Record(logging.LogRecord):
    """A log record whose message is free of control characters; only libraries may log lines that are not indented."""

    def getMessage(self) -> str:
        is_ours = self.name.partition(".")[0] in _top_level_names()
        return visible_lines(super().getMessage(), "␊" if is_ours else "\n  ")


def set_up_logging() -> None:
    """Log to stderr in one format; ranks other than 0 log warnings only, with their rank."""
    quiet_libraries()
    # torch reads it on import: a process that waits for one that is gone would print C++ frames, again and again.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    prefix = "" if is_first() else f"[{describe_process(with_host=False)}] "
    logging.basicConfig(
        handlers=[LineHandler(sys.stderr)], format=f"%(asctime)s %(levelname)s {prefix}%(message)s", datefmt="%H:%M:%S",
        force=True,
    )  # fmt: skip
    if terminal_width(sys.stderr) is None:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # of transformers as well, which read it on import
    if prefix:
        _silence_libraries()
    for name in _top_level_names():
        logging.getLogger(name).setLevel(logging.WARNING if prefix else logging.INFO)


def quiet_libraries() -> None:
    """Hide warnings and log lines of libraries that have no cause here."""
    for message in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    for name, message in _KNOWN_LINES.items():
        logging.getLogger(name).addFilter(_Without(message))


def _escape_lines() -> None:
    """Let no log line and no warning of this process contain control characters."""
    logging.setLogRecordFactory(_Record)
    warnings.formatwarning = _format_warning


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return visible_lines(f"{filename}:{lineno}: {category.__name__}: {message}", "\n  ") + "\n"


def _silence_libraries() -> None:
    """Hide warnings of libraries: rank 0 shows the same ones."""
    warnings.simplefilter("ignore")
    # transformers and huggingface_hub read these on import.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("DeepSpeed", "accelerate", "peft", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
        # DeepSpeed sets its own level when it is imported; a filter stays.
        logging.getLogger(name).addFilter(lambda record: record.levelno >= logging.ERROR)


@cache
def _top_level_names() -> frozenset[str]:
    """Names of the project's modules and packages; every logger of the project is below one of them."""
    root = Path(__file__).parent
    return frozenset(
        [path.stem for path in root.glob("*.py")] + [path.parent.name for path in root.glob("*/__init__.py")]
    )
