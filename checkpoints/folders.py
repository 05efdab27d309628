"""Output folders, written in one step, and the space they need; needs no torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from console import show_as_final
from errors import ConfigError
from outputs import check_output_folder, stage, sync
from ownership import make_temporary_folder


def sync_files(folder: Path) -> None:
    """Flush all files below a folder from the operating system's cache to disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            sync(path)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Own a folder during the block, and yield an empty folder in it to write files in until they are complete.

    The block syncs (:func:`sync_files`) and moves what is complete; whatever is left in the folder when the block ends,
    with an error (Ctrl-C too) or without, is removed with it. So is what a killed process left at ``path``.

    Raises:
        ConfigError: another process uses ``path``, or something of the user is there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with make_temporary_folder(path, str(path)):
        folder = path / "files"
        folder.mkdir()
        yield folder


@contextmanager
def staged_folder(path: str | Path, flag: str = "--output") -> Iterator[Path]:
    """Write a folder in one step: yield ``PATH.partial/NAME``, and rename it to ``path`` after the block.

    After an error in the block (Ctrl-C too) the partial folder is removed and ``path`` is unchanged. What a killed
    process has left there is removed by the next one for the same path (see :func:`outputs.stage`).

    Raises:
        ConfigError: ``path`` is not free (see :func:`outputs.check_output_folder`), cannot be created, or is being
            written by another process.
    """
    path = Path(path)
    check_output_folder(path, flag)
    final = path.resolve()
    try:
        owned = stage(final, f"{flag} {path}")
    except OSError as error:
        what = f"{flag} {path} cannot be created: {error.strerror}"
        raise ConfigError(what, "Choose a writable folder") from error
    staging, is_kept = owned.path / final.name, False
    try:
        check_output_folder(path, flag)  # another process may have completed it meanwhile
        staging.mkdir()
        show_as_final(staging, path)
        yield staging
        sync_files(staging)
        sync(staging)
        try:
            os.replace(staging, final)
        except OSError as error:
            is_kept = True  # it is complete
            show_as_final(staging, staging)
            fix = f"The complete result is in {staging}: move it by hand"
            raise ConfigError(f"{flag} {path} cannot be replaced by the result: {error.strerror}", fix) from error
        sync(final.parent)
    finally:
        if is_kept:
            owned.release()
        else:
            owned.remove()


def check_space(needed: int, output: Path, flag: str = "--output") -> None:
    """Raise ``ConfigError`` if the disk of ``output`` has less than ``needed`` bytes free."""
    folder = next(parent for parent in output.resolve().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if needed > free:
        what = f"{flag} {output} needs {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free"
        raise ConfigError(what, "Free some space or choose another disk")
