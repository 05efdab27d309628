"""Errors of libraries while they open a user's files, as one line that names the files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from errors import ConfigError, DataError, RunError, one_line


@contextmanager
def library_errors(
    place: str, fix: str, describe: Callable[[Exception], str] = one_line, path: str | Path = ""
) -> Iterator[None]:
    """Raise any error of the block as a ``ConfigError``: libraries have no common class for a faulty file.

    tokenizers raises plain exceptions, and panics of Rust that are no exceptions at all. Errors of a run, of memory and
    interruptions are left as they are.

    Args:
        place: the flag, folder or file that is opened.
        path: errors of this toolkit that contain it are left as they are; ``place`` is put before others, in place of
            the name of its file. By default ``place``.
        fix: what the user can do about it.
        describe: describes the error of a library.
    """
    try:
        yield
    except ConfigError as error:
        if (str(path) or place) in str(error):
            raise
        raise ConfigError(f"{place}: {str(error).removeprefix(f'{Path(place).name}: ')}") from error
    except (DataError, RunError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
            raise
        raise ConfigError(f"{place}: {describe(error) or type(error).__name__}", fix) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ConfigError(f"{place}: {one_line(error)}", fix) from error
