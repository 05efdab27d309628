"""Output files and folders: checked before work begins, written beside their path under a name of their own.

A file or folder is written in a temporary folder that this process owns (``ownership.py``), and renamed when it is
complete. Two processes cannot write one output at the same time, and nothing that is not ours is replaced or removed.
"""

from __future__ import annotations

import argparse
import errno
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from errors import ConfigError
from ownership import NotOursError, OwnedFolder, make_temporary_folder

Inputs = Mapping[str, Iterable[Path]]
"""Files and folders that a command reads, by the flag that named them."""

# Bytes of a name: most file systems have 255, and temporary names are longer than the final ones.
_MAX_NAME_BYTES = 230
_MAX_TEMPORARY_NAMES = 9
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFREG: "a file",
}


# ------------------------------------------------------------------------------------------------ before work begins


def parse_output(text: str) -> Path:
    """Return the path of an output flag, as the ``type`` of an argument: ``Path("")`` would be the working folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the name is empty")
    return Path(text)


def check_output_file(path: Path, flag: str, inputs: Inputs | None = None) -> None:
    """Check that a file can be written, or be replaced if it exists; change nothing.

    Raises:
        ConfigError: something else than a file is there, it belongs to an input, or the folder is missing or cannot be
            written to.
    """
    status = _status(path, flag)
    if status is not None and not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{flag} {path} is {kind_of(status)}", "Give the name of a file")
    parent = path.parent
    if not os.path.isdir(parent):
        raise ConfigError(f"{flag} {path}: there is no folder {parent}", "Create it first, or name another one")
    check_outside_inputs(path, flag, inputs or {})
    check_writable(parent, f"{flag} {path}")


def check_output_folder(path: Path, flag: str, inputs: Inputs | None = None) -> None:
    """Check that a new folder can be written: it must not exist, or be empty; change nothing.

    Raises:
        ConfigError: something else is there, it is in an input's folder, or it cannot be made.
    """
    status = _status(path, flag)
    if status is not None and not stat.S_ISDIR(status.st_mode):
        raise ConfigError(f"{flag} {path} is {kind_of(status)}", "Give a folder that does not exist yet")
    check_outside_inputs(path, flag, inputs or {})
    if status is not None:
        try:
            is_empty = not os.listdir(path)
        except OSError as error:
            raise ConfigError(f"{flag} {path} cannot be read ({error.strerror})", "Give another folder") from error
        if not is_empty:
            raise ConfigError(f"{flag} {path} is not empty", "Give a folder that does not exist yet, or empty it")
        # The complete folder replaces an empty one, but cannot replace these.
        if os.path.ismount(path) or os.path.samefile(path, os.curdir):
            kind = "a mount point" if os.path.ismount(path) else "the working folder"
            raise ConfigError(f"{flag} {path} is {kind}", "Give a folder that does not exist yet")
    check_writable(path.parent, f"{flag} {path}")


def check_shared_folder(path: Path, flag: str, inputs: Inputs | None = None) -> None:
    """Check that files can be written to a folder, beside others if it exists; change nothing.

    Raises:
        ConfigError: something else is there, it is in an input's folder, or it cannot be made or written to.
    """
    check_name(path, flag)
    if os.path.lexists(path) and not os.path.isdir(path):
        raise ConfigError(f"{flag} {path} is {_kind_at(path)}", "Give a folder")
    check_outside_inputs(path, flag, inputs or {})
    check_writable(path, f"{flag} {path}")


def check_name(path: str | Path, flag: str) -> None:
    """Raise ``ConfigError`` for a path that no file system takes, or that could not be written into a text."""
    try:
        absolute = os.path.abspath(path)
    except OSError as error:
        raise ConfigError("the working folder does not exist any more", "Change to a folder that exists") from error
    try:
        absolute.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{flag} {str(path)!r}: the name is not UTF-8", "Give another name") from None
    if not str(path).strip():
        what = "the name is empty"
    elif str(path) == "-":
        what = "writing to stdout is not supported"
    elif "\0" in absolute:
        what = "the name contains a null character"
    elif (length := len(os.path.basename(absolute).encode())) > _MAX_NAME_BYTES:
        what = f"the name has {length} bytes, more than {_MAX_NAME_BYTES}"
    else:
        return
    raise ConfigError(f"{flag} {str(path)!r}: {what}", "Give another name")


def check_writable(folder: Path, label: str) -> None:
    """Raise ``ConfigError`` unless files can be created in a folder, or in the nearest one above it that exists.

    Args:
        label: how the message names what is written, such as ``--output out``.
    """
    absolute = Path(os.path.abspath(folder))
    existing = next(path for path in (folder, absolute, *absolute.parents) if os.path.lexists(path))
    if not os.path.isdir(existing):
        raise ConfigError(f"{label}: {existing} is {_kind_at(existing)}", "Give a folder")
    try:
        # Permissions are not enough: a disk can be mounted read-only, and root has every permission.
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(f"{label}: {existing} is not writable ({reason})", "Choose a writable folder") from error


def check_outside_inputs(path: Path, flag: str, inputs: Inputs) -> None:
    """Check that an output is none of the inputs and not in the folder of one, by whatever name.

    Raises:
        ConfigError: names the input.
    """
    real = os.path.realpath(path)
    for input_flag, sources in inputs.items():
        for source in sources:
            folder = os.path.isdir(source)
            if real == os.path.realpath(source) or _is_same(path, source):
                kind = "folder" if folder else "file"
                raise ConfigError(f"{flag} {path} is the {kind} of {input_flag}", "Give another name")
            if Path(os.path.realpath(source)) in Path(real).parents:
                raise ConfigError(f"{flag} {path} is inside the folder of {input_flag}", "Give a name outside of it")
            # A file of a hub's cache is a link, and a file may have a second name.
            with suppress(OSError):  # reading the input reports it
                for name in os.listdir(source) if folder and os.path.isfile(path) else ():
                    if _is_same(path, Path(source, name)):
                        raise ConfigError(f"{flag} {path} is {name} of {input_flag}", "Give another name")


def _is_same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:  # one of them does not exist
        return False


def _status(path: Path, flag: str) -> os.stat_result | None:
    """Return what is at a path, links not followed; ``None`` if nothing is.

    Raises:
        ConfigError: nothing can be there.
    """
    check_name(path, flag)
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ENOTDIR:
            above = next(folder for folder in path.parents if os.path.lexists(folder))
            raise ConfigError(f"{flag} {path}: {above} is {_kind_at(above)}", "Give another name") from error
        raise ConfigError(f"{flag} {path}: {(error.strerror or '').lower()}", "Give another name") from error


def _kind_at(path: Path) -> str:
    return kind_of(os.stat(path)) if os.path.exists(path) else "a dangling link"


def kind_of(status: os.stat_result) -> str:
    """Return what a path is, for a message: ``a folder``, ``a named pipe``."""
    return _KINDS.get(stat.S_IFMT(status.st_mode), "not a file")


# ---------------------------------------------------------------------------------------------------------- writing


def stage(final: Path, label: str, prefix: str = "") -> OwnedFolder:
    """Make the temporary folder in which ``final`` is written: ``PREFIX NAME.partial`` beside it.

    The folder of a dead process is emptied and used again. Where the user has a file or folder of that name, it is
    ``NAME.partial-2``, and so on.

    Args:
        label: how error messages name what is written, such as ``--output out``.

    Raises:
        ConfigError: another process is writing ``final``.
        OSError: the folder cannot be made.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = f"{prefix}{final.name}.partial"
    for name in (temporary, *(f"{temporary}-{number}" for number in range(2, _MAX_TEMPORARY_NAMES + 1))):
        with suppress(NotOursError):
            return make_temporary_folder(final.with_name(name), label)
    raise ConfigError(f"{label}: {final.with_name(temporary)} has no mark of this toolkit", "Move it away")


@contextmanager
def staged_file(path: Path, replaces: bool = True) -> Iterator[Path]:
    """Write a file in one step: at any time ``path`` is the previous file or the complete new one.

    Yields a path of the same name in a temporary folder, where the block writes and closes the file. After the block
    the file is synced to disk and renamed to ``path``. After an error in the block (Ctrl-C too) it is removed and
    ``path`` is unchanged. What a killed process leaves is removed by the next write.

    Args:
        replaces: replace a file that is there; otherwise it is refused, even if another process has just written it.

    Raises:
        ConfigError: ``path`` is something else than a file, or another process is writing it.
        OSError: it cannot be written; one without a file name, as a failed write has none, gets ``path``.
    """
    _check_replaceable(path, replaces)
    try:
        with stage(path, str(path), prefix=".") as folder:
            staging = folder.path / path.name
            yield staging
            sync(staging)
            _check_replaceable(path, replaces)
            os.replace(staging, path)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _check_replaceable(path: Path, replaces: bool) -> None:
    with suppress(FileNotFoundError):
        status = os.lstat(path)
        if not replaces:
            raise ConfigError(f"{path} exists", "Give another name")
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"{path} is {kind_of(status)}, not a file", "Move it away, or give another name")


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of entries, from the operating system's cache to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
