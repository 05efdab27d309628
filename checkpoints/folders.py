"""Output folders: checked before they are written, and written in one step; needs no torch."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from checkpoints.files import sync
from errors import ConfigError


def sync_files(folder: Path) -> None:
    """Flush all files below a folder from the operating system's cache to disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            sync(path)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to write files in before they are renamed to their final names, and remove it afterwards.

    The block syncs (:func:`sync_files`) and moves what is complete; whatever is left in the folder when the block ends,
    with an error (Ctrl-C too) or without, is removed with it. So is a folder that a killed process left at ``path``;
    no lock is taken: two processes must not use one ``path``. Use :func:`staged_folder` for a folder that a user names.
    """
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        remove_folder(path)


def check_output_folder(path: str | Path, flag: str = "--output") -> None:
    """Raise ``ConfigError`` unless ``path`` does not exist or is an empty folder."""
    path = Path(path)
    if path.is_symlink():
        raise ConfigError(f"{flag} {path} is a symbolic link", "Give the folder itself, or one that does not exist yet")
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{flag} {path} is a file", "Give a folder that does not exist yet")
    if path.is_dir() and any(path.iterdir()):
        raise ConfigError(f"{flag} {path} is not empty", "Give a folder that does not exist yet, or empty it")


@contextmanager
def staged_folder(path: str | Path, flag: str = "--output") -> Iterator[Path]:
    """Write a folder in one step: yield ``PATH.partial-PID``, and rename it to ``path`` after the block.

    After an error in the block (Ctrl-C too) the partial folder is removed and ``path`` is unchanged. Partial folders of
    killed processes for the same path are removed first; those of running processes are locked and stay.

    Raises:
        ConfigError: ``path`` is not free (see :func:`check_output_folder`) or cannot be created.
    """
    check_output_folder(path, flag)
    final = Path(path).resolve()
    staging = final.with_name(f"{final.name}.partial-{os.getpid()}")
    try:
        _remove_leftovers(final)
        staging.mkdir(parents=True)
        lock = os.open(staging, os.O_RDONLY)
    except OSError as error:
        what = f"{flag} {path} cannot be created: {error.strerror}"
        raise ConfigError(what, "Choose a writable folder") from error
    try:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the process ends, even if it is killed
        try:
            yield staging
            sync_files(staging)
        except BaseException:
            remove_folder(staging)
            raise
        try:
            sync(staging)
            os.replace(staging, final)
            sync(final.parent)
        except OSError as error:
            # The result is complete: keep it for the user instead of removing it.
            fix = f"The complete result is in {staging}: move it by hand"
            raise ConfigError(f"{flag} {path} cannot be replaced by the result: {error.strerror}", fix) from error
    finally:
        os.close(lock)


def remove_folder(folder: Path) -> None:
    """Remove a folder; retry once if a signal interrupts the removal."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _remove_leftovers(final: Path) -> None:
    """Remove the partial folders of ``final`` that no running process has locked."""
    for folder in final.parent.glob(f"{glob.escape(final.name)}.partial-*"):
        lock = os.open(folder, os.O_RDONLY)
        try:
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)


def check_outside_inputs(output: Path, inputs: Mapping[str, Iterable[Path]], flag: str = "--output") -> None:
    """Check that the output folder is none of the input folders and is not inside one.

    Args:
        inputs: input folders by the flag that named them.
        flag: the flag that named ``output``.

    Raises:
        ConfigError: ``output`` is an input folder or inside one.
    """
    for input_flag, folders in inputs.items():
        for folder in folders:
            if folder.resolve() in (output.resolve(), *output.resolve().parents):
                relation = "is" if folder.resolve() == output.resolve() else "is inside"
                what = f"{flag} {output} {relation} the folder of {input_flag}"
                raise ConfigError(what, "Give a new folder beside it")


def check_space(needed: int, output: Path, flag: str = "--output") -> None:
    """Raise ``ConfigError`` if the disk of ``output`` has less than ``needed`` bytes free."""
    folder = next(parent for parent in output.resolve().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if needed > free:
        what = f"{flag} {output} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        raise ConfigError(what, "Free some space or choose another disk")
