"""Output of commands: text without control characters, streams that never fail, and commands for the user to type.

Imports the standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import shlex
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# ----------------------------------------------------------------------------------------------------------------- text


def _build_replacements() -> dict[int, str]:
    """Map characters that control a terminal or reverse the direction of text to what is shown instead."""
    table = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: "␡"}
    table |= {code: f"\\x{code:02x}" for code in range(0x80, 0xA0)}
    bidirectional = [0x61C, 0x200E, 0x200F, 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
    return table | {code: f"\\u{code:04x}" for code in [*bidirectional, *range(0xD800, 0xE000)]}


_REPLACEMENTS = _build_replacements()


def visible(text: str) -> str:
    """Replace every character that could control a terminal or a browser, except newlines and tabs."""
    return text.translate(_REPLACEMENTS)


_final_names: dict[str, str] = {}


def show_as_final(temporary: Path, final: Path) -> None:
    """Name ``final`` in every message about a temporary folder, which is gone when the user reads it."""
    _final_names[str(temporary)] = str(final)


def visible_lines(text: object, newline: str = "␊") -> str:
    """Return a message of possibly several lines that no name or value in it can forge.

    Every line after the first is indented by two spaces, as in numbered lists; other newlines are replaced.
    """
    message = str(text)
    for temporary, final in _final_names.items():
        message = message.replace(temporary, final)
    first, *others = visible(message).split("\n")
    return first + "".join(("\n" if line.startswith("  ") else newline) + line for line in others)


def show(text: object) -> None:
    """Print a line, or lines of which all but the first are indented, about what a command has done."""
    print(visible_lines(text))


# -------------------------------------------------------------------------------------------------------------- streams


class _Output(io.TextIOWrapper):
    """A stream that drops what it cannot write: its reader is gone, or the disk below a log file is full.

    Attributes:
        lost: the first error other than a lost reader.
    """

    lost: OSError | None = None

    def write(self, text: str) -> int:
        with self._no_error():
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with self._no_error():
            super().flush()

    @contextlib.contextmanager
    def _no_error(self) -> Iterator[None]:
        try:
            yield
        except BlockingIOError:  # a terminal that another program has put into non-blocking mode
            os.set_blocking(self.fileno(), True)
        except OSError as error:
            if error.errno in DISK_FULL:
                self.lost = self.lost or error
                return
            # The buffer keeps what it cannot write, and would try again when Python exits.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)


def protect_streams() -> None:
    """Let no write to stdout or stderr fail: output that nobody reads never changes what a command does.

    Closed descriptors are opened on ``/dev/null``, so that no file of the command gets their number. Characters that
    the encoding of a stream lacks are written as escapes.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
        stream = getattr(sys, name)
        if name == "stdin":
            sys.stdin = stream or os.fdopen(0, encoding="utf-8", closefd=False)
            if isinstance(sys.stdin, io.TextIOWrapper):
                sys.stdin.reconfigure(errors="replace")
        elif stream is None or (isinstance(stream, io.TextIOWrapper) and stream is getattr(sys, f"__{name}__")):
            setattr(sys, name, _protected(number, stream))


def _protected(number: int, stream: io.TextIOWrapper | None) -> io.TextIOWrapper:
    if stream is not None:
        with contextlib.suppress(OSError):
            stream.flush()
    return _Output(
        io.BufferedWriter(io.FileIO(number, "w", closefd=False)),
        encoding="utf-8" if stream is None else stream.encoding,
        errors="backslashreplace",
        line_buffering=number == 2 or (stream is not None and stream.line_buffering),
        write_through=stream is not None and stream.write_through,
    )


def lost_output() -> OSError | None:
    """Return why some of stdout could not be written; ``None`` if all of it was, or if its reader is gone."""
    sys.stdout.flush()
    return sys.stdout.lost if isinstance(sys.stdout, _Output) else None


# ------------------------------------------------------------------------------------------------------------ terminals

RED, YELLOW, RESET = "\x1b[31m", "\x1b[33m", "\x1b[0m"


def wants_color(stream: TextIO) -> bool:
    """Return whether to use colours on a stream: on a terminal, unless the user has set NO_COLOR."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def terminal_width(stream: TextIO) -> int | None:
    """Return the columns of the terminal that a stream is, also by ``COLUMNS``; ``None`` if it is none."""
    if not stream.isatty() or os.environ.get("TERM") == "dumb":
        return None
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns) > 0:
        return int(columns)
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


class LineHandler(logging.StreamHandler[TextIO]):
    """Writes log lines above tqdm's bars; on a terminal with warnings in colour, and broken between words."""

    def format(self, record: logging.LogRecord) -> str:
        first, *others = super().format(record).split("\n")
        width = terminal_width(self.stream)
        if width is not None and len(first) >= width:
            first = textwrap.fill(
                first, width - 1, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
            )
        if record.levelno >= logging.WARNING and wants_color(self.stream):
            name = record.levelname
            first = first.replace(name, f"{RED if record.levelno >= logging.ERROR else YELLOW}{name}{RESET}", 1)
        return "\n".join([first, *others])

    def emit(self, record: logging.LogRecord) -> None:
        tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
        with contextlib.nullcontext() if tqdm is None else tqdm.external_write_mode(file=self.stream):
            super().emit(record)


# ------------------------------------------------------------------------------------------------------------- commands


def python_command(command: str, *words: object) -> str:
    """Return a command of this checkout as the user would type it in the current folder, with the Python that runs.

    Args:
        command: ``merge_lora.py --adapter`` or ``-m scripts.ask --model_name_or_path``: a script or module of this
            checkout with flags, inserted as it is.
        words: what follows. Paths are quoted for a shell; anything else is inserted as it is.
    """
    first, _, rest = command.partition(" ")
    prefix = []
    if first.endswith(".py"):
        first = shlex.quote(shown_path(ROOT / first))
    elif command.startswith(("-m scripts.", "-m benchmarks.")) and _working_folder() != ROOT:
        prefix = [f"PYTHONPATH={shlex.quote(str(ROOT))}"]
    python = shlex.quote(shown_path(Path(sys.executable))) if sys.executable else "python"
    others = [shlex.quote(str(word)) if isinstance(word, Path) else str(word) for word in words]
    return " ".join([*prefix, python, first, *([rest] if rest else []), *others])


def pip_command(*packages: str) -> str:
    """Return the command that installs packages, or a requirements file of this checkout, for the Python that runs."""
    words: list[object] = []
    for package in packages:
        is_file = package.endswith(".txt")
        words += ["-r", _root_file(package), "-c", _root_file("constraints.txt")] if is_file else [package]
    return python_command("-m pip install", *words)


def _root_file(name: str) -> Path:
    return Path(shown_path(ROOT / name))


def shown_path(path: Path) -> str:
    """Return an absolute path relative to the current folder if it is below it."""
    folder = _working_folder()
    return str(path.relative_to(folder)) if folder is not None and path.is_relative_to(folder) else str(path)


def _working_folder() -> Path | None:
    """Return the current folder; ``None`` if it has been deleted."""
    try:
        return Path.cwd()
    except OSError:
        return None
