"""Exceptions that a user can cause or encounter, and how several of them become one message.

Imports nothing heavy. Travels as code inside exported model folders.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar


class ConfigError(ValueError):
    """An unusable flag, checkpoint folder or environment.

    Args:
        what: the flag or path, its value, and what is wrong with it.
        fix: what to do instead.

    Attributes:
        is_shared: whether every rank of the run raises this error, so that only rank 0 reports it.
    """

    is_shared = False

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(f"{what}. {fix}" if fix else what)


class DataError(ValueError):
    """An unusable record in the user's data.

    Args:
        where: location of the record; as text ``file:line`` or ``file (record N)``.
        what: what is wrong with it.
        fix: what to do instead.

    Attributes:
        is_shared: see ``ConfigError``.
    """

    is_shared = False

    def __init__(self, where: object, what: str, fix: str = "") -> None:
        super().__init__(f"{where}: {what}. {fix}" if fix else f"{where}: {what}")
        self.where = str(where)

    def __reduce__(self) -> tuple[object, ...]:  # otherwise it would be built again from its whole text
        return _restored, (type(self), self.where, str(self))


def _restored(type_: type[DataError], where: str, text: str) -> DataError:
    error = type_.__new__(type_, text)
    error.where = where
    return error


class RunError(RuntimeError):
    """A run that had started and cannot continue, for a known reason: a diverged loss, a full disk.

    Args:
        what: what happened, at which step or in which folder.
        fix: what to do about it.
    """

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(f"{what}. {fix}" if fix else what)


class Terminated(BaseException):
    """SIGTERM, raised in the main thread so that ``finally`` blocks run as they do after Ctrl-C."""


_Error = TypeVar("_Error", ConfigError, DataError)


def shared(error: _Error) -> _Error:
    """Mark an error that every rank raises with the same text, so that only rank 0 reports it."""
    error.is_shared = True
    return error


def one_line(error: BaseException) -> str:
    """Return the text of a library's error without line breaks, at most 300 characters."""
    return " ".join(str(error).split())[:300]


def numbered(title: str, items: Sequence[object]) -> str:
    """Return several errors as one message: the title, then one numbered line for each."""
    return "\n".join([f"{title}:", *(f"  {number}. {item}" for number, item in enumerate(items, 1))])
