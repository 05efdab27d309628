"""The two errors a user can cause, and how a command ends with one.

Every command of this project reports a fault of its input in one line that names the flag or ``file:line``, the value
and the fix, and ends with exit code 2. Anything else that escapes is a bug of ours and keeps its traceback.
This module imports nothing of ours and nothing heavy, so that a wrong flag is refused before torch is loaded.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn


class ConfigError(ValueError):
    """A flag, a checkpoint folder or an environment that cannot work.

    Args:
        what: the flag or path, its value and what is wrong with it.
        fix: what to do instead.
    """

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(f"{what}. {fix}" if fix else what)


class DataError(ValueError):
    """A record of the user's data that cannot be used.

    Args:
        where: ``file:line`` (or ``file: record N``) of the fault.
        what: what was found there.
        fix: what to do instead.
    """

    def __init__(self, where: str, what: str, fix: str = "") -> None:
        super().__init__(f"{where}: {what}. {fix}" if fix else f"{where}: {what}")
        self.where = where


def one_line(error: BaseException) -> str:
    """A library's complaint for a message of ours: without line breaks, and not a page long."""
    return " ".join(str(error).split())[:300]


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line, like every other fault. Give it ``prog`` as the user types it."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message}", f"{self.prog} --help lists the flags")


def run_command(main: Callable[[Sequence[str]], int | None], name: str) -> None:
    """Run ``main(argv)`` as the process's main function and exit with its code.

    Exit codes: what ``main`` returns (``None`` is 0), 2 for a ``ConfigError`` or ``DataError``, 130 after Ctrl-C.
    """
    try:
        code = main(sys.argv[1:])
    except (ConfigError, DataError) as error:
        print(f"{name}: error: {error}", file=sys.stderr, flush=True)
        code = 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr, flush=True)
        code = 130
    sys.exit(code)
