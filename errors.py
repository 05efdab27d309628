"""The errors a user can cause or meet, and how a command ends with one.

Every command of this project reports a fault in one line (or a numbered list) that names the flag or ``file:line``, the
value and the fix. Exit codes tell a script what happened: 2 refused, 1 failed, 130 and 143 interrupted.
This module imports nothing of ours and nothing heavy, so that a wrong flag is refused before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar


class ConfigError(ValueError):
    """A flag, a checkpoint folder or an environment that cannot work.

    Args:
        what: the flag or path, its value and what is wrong with it.
        fix: what to do instead.

    Attributes:
        is_shared: whether all processes of the run raise it, so that the first reports it for all.
    """

    is_shared = False

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(f"{what}. {fix}" if fix else what)


class DataError(ValueError):
    """A record of the user's data that cannot be used.

    Args:
        where: the place of the fault; as text ``file:line`` or ``file (record N)``.
        what: what was found there.
        fix: what to do instead.

    Attributes:
        is_shared: as that of ``ConfigError``.
    """

    is_shared = False

    def __init__(self, where: object, what: str, fix: str = "") -> None:
        super().__init__(f"{where}: {what}. {fix}" if fix else f"{where}: {what}")
        self.where = str(where)


class RunError(RuntimeError):
    """A run that had begun and cannot go on, for a reason that is known: a diverged loss, a full disk.

    Args:
        what: what happened, at which step or in which folder.
        fix: what to do about it.
    """

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(f"{what}. {fix}" if fix else what)


class Terminated(BaseException):
    """SIGTERM, raised in the main thread so that what cleans up after Ctrl-C cleans up after it too."""


_Fault = TypeVar("_Fault", ConfigError, DataError)


def shared(fault: _Fault) -> _Fault:
    """Mark a fault that all processes of the run raise, with the same words: the first one reports it."""
    fault.is_shared = True
    return fault


def one_line(error: BaseException) -> str:
    """A library's complaint for a message of ours: without line breaks, and not a page long."""
    return " ".join(str(error).split())[:300]


def numbered(title: str, items: Sequence[object]) -> str:
    """Several faults as one message: the title, then a line for each of them, counted from 1."""
    return "\n".join([f"{title}:", *(f"  {number}. {item}" for number, item in enumerate(items, 1))])
