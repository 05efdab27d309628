"""Folders that one process owns: a locked file in the folder, its mark, names the process.

The lock ends with the process, even if it is killed. A folder whose mark is not locked was left by a dead process, and
only such a folder is ever emptied or removed. On file systems without locks the owner updates the time of its mark
instead, and another process waits for an update before it takes the folder over.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import stat
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from errors import ConfigError

MARK = ".owner.json"
"""Name of the mark in a folder that is in use."""

_FORMAT = "qwen-finetuning owner 1"
_MAX_BYTES = 10_000
# Seconds that a process tries to lock a mark: another one may be about to release it, or be reading it.
_PATIENCE = 0.2
# Seconds, without locks: between two updates of a mark, and without an update until its owner is regarded as dead.
_UPDATE_INTERVAL, _DEAD_AFTER = 5.0, 60.0

# Descriptors of the marks of this process. A forked child closes its copies, so that a lock ends with its owner.
_owned: set[int] = set()


def _close_in_child() -> None:
    for descriptor in _owned:
        os.close(descriptor)
    _owned.clear()


os.register_at_fork(after_in_child=_close_in_child)


class NotOursError(ConfigError):
    """A file or folder of the user where this toolkit would write its own."""


def _not_ours(path: Path) -> NotOursError:
    return NotOursError(f"{path} has no mark of this toolkit and may be yours", "Move it away")


class OwnedFolder:
    """A folder that this process owns until it is released or removed; as a context manager it is removed at the end.

    Args:
        path: an existing folder.
        label: how error messages name what is written, such as ``--output_dir out``.

    Raises:
        ConfigError: another process owns it; the message names the process.
        NotOursError: it contains something else under the name of the mark.
    """

    def __init__(self, path: Path, label: str) -> None:
        self.path = path
        self._mark = path / MARK
        self._released = threading.Event()
        self._descriptor, has_lock = _acquire(self._mark, label)
        if not has_lock:
            threading.Thread(target=self._update, daemon=True).start()

    def __enter__(self) -> OwnedFolder:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def release(self) -> None:
        """Remove the mark; the folder stays."""
        self._released.set()
        if self._descriptor in _owned:  # not in a forked child
            _owned.remove(self._descriptor)
            with suppress(OSError):
                if _is_at(self._descriptor, self._mark):
                    self._mark.unlink()
            os.close(self._descriptor)

    def clear(self) -> None:
        """Remove everything in the folder but the mark."""
        with os.scandir(self.path) as entries:
            for entry in entries:
                if entry.name != MARK and entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                elif entry.name != MARK:
                    os.unlink(entry.path)

    def remove(self) -> None:
        """Remove the folder, the mark last; try again if a signal interrupts it."""
        try:
            self._remove()
        except BaseException:
            self._remove()
            raise

    def _remove(self) -> None:
        with suppress(OSError):
            self.clear()
        self.release()
        with suppress(OSError):
            self.path.rmdir()

    def _update(self) -> None:
        while not self._released.wait(_UPDATE_INTERVAL):
            with suppress(OSError):
                os.utime(self._mark)


def make_temporary_folder(path: Path, label: str) -> OwnedFolder:
    """Make an empty folder at ``path``; one that a dead process of this toolkit left there is removed first.

    Args:
        label: see :class:`OwnedFolder`.

    Raises:
        ConfigError: another process uses it.
        NotOursError: something of the user is there; it is not changed.
        OSError: the folder cannot be made.
    """
    while True:
        try:
            os.mkdir(path, 0o700)  # nobody else may put a link into it
            is_new = True
        except FileExistsError:
            check_temporary_folder(path)
            is_new = False
        try:
            folder = OwnedFolder(path, label)
        except FileNotFoundError:  # its owner has removed it meanwhile
            continue
        except OSError:
            if is_new:
                with suppress(OSError):
                    os.rmdir(path)
            raise
        if is_new:
            return folder
        folder.remove()
        if os.path.lexists(path) and not has_mark(path):
            raise _not_ours(path)


def check_temporary_folder(path: Path) -> None:
    """Raise ``NotOursError`` if something of the user is where a temporary folder is to be made."""
    try:
        is_folder = stat.S_ISDIR(os.lstat(path).st_mode)
        if not is_folder or (not has_mark(path) and set(os.listdir(path)) - {MARK}):
            raise _not_ours(path)
    except PermissionError:  # of another user
        raise _not_ours(path) from None
    except FileNotFoundError:
        pass


def has_mark(folder: Path) -> bool:
    """Return whether a folder is in use by this toolkit, or was left by a dead process of it."""
    try:
        descriptor = _open_mark(folder / MARK)
    except (OSError, NotOursError):
        return False
    try:
        _read_owner(descriptor, folder / MARK)
    except NotOursError:
        return False
    finally:
        os.close(descriptor)
    return True


def check_not_in_use(folder: Path, label: str) -> None:
    """Raise ``ConfigError`` if another process owns a folder; change nothing, and take no lock."""
    mark = folder / MARK
    with suppress(OSError, NotOursError):
        descriptor = _open_mark(mark)
        try:
            owner, is_mine = _read_owner(descriptor, mark), any(_is_at(owned, mark) for owned in _owned)
            if not is_mine and _lock(descriptor, fcntl.LOCK_SH) is False:
                raise _in_use(label, owner, mark)
        finally:
            os.close(descriptor)


def _acquire(mark: Path, label: str) -> tuple[int, bool]:
    """Create and lock a mark; return its descriptor, and whether the file system has locks."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            descriptor, is_new = os.open(mark, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644), True
        except FileExistsError:
            try:
                descriptor, is_new = _open_mark(mark), False
            except FileNotFoundError:
                continue
        try:
            owner = "" if is_new else _read_owner(descriptor, mark)
            is_locked = _lock(descriptor, fcntl.LOCK_EX)
            if is_locked is False or (is_locked is None and not is_new and _is_updated(mark)):
                if time.monotonic() > deadline:
                    raise _in_use(label, owner, mark)
            elif _is_at(descriptor, mark):  # else it has been removed meanwhile
                if is_new:
                    _write_owner(descriptor, mark)
                    _owned.add(descriptor)
                    return descriptor, is_locked is not None
                os.unlink(mark)  # its owner is dead
                continue
        finally:
            if descriptor not in _owned:
                os.close(descriptor)
        time.sleep(0.02)


def _open_mark(mark: Path) -> int:
    """Open an existing mark, for writing if it may be, as the locks of network file systems require.

    Raises:
        NotOursError: it is not a regular file.
    """
    if not stat.S_ISREG(os.lstat(mark).st_mode):
        raise _not_ours(mark)
    flags = os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(mark, os.O_RDWR | flags)
    except PermissionError:
        return os.open(mark, os.O_RDONLY | flags)


def _write_owner(descriptor: int, mark: Path) -> None:
    """Name this process in its new mark; remove the mark if the disk is full."""
    text = _describe_this_process()
    try:
        if os.write(descriptor, text) < len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(mark))
    except BaseException:
        os.unlink(mark)
        raise


def _describe_this_process() -> bytes:
    command = Path(sys.argv[0]).name if sys.argv else "python"
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    content = {"format": _FORMAT, "host": socket.gethostname(), "pid": os.getpid(), "command": command, "since": since}
    return json.dumps(content).encode() + b"\n"


def _read_owner(descriptor: int, mark: Path) -> str:
    """Return the owner that a mark names, for messages; empty if it is being written.

    Raises:
        NotOursError: another file.
    """
    text = os.pread(descriptor, _MAX_BYTES, 0)
    try:
        content = json.loads(text) if text else {"format": _FORMAT}
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise _not_ours(mark)
    if not text:
        return "another process"
    command, pid, host, since = (content.get(key) for key in ("command", "pid", "host", "since"))
    return f"{command} (process {pid} on {host}, since {since})"


def _in_use(label: str, owner: str, mark: Path) -> ConfigError:
    fix = f"Wait for its end or give another name. If that process is gone for certain, remove {mark}"
    return ConfigError(f"{label} is in use by {owner}", fix)


def _lock(descriptor: int, kind: int) -> bool | None:
    """Lock an open file without waiting; return False if another process has locked it, None without locks."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems have no locks
        return None
    return True


def _is_updated(mark: Path) -> bool:
    """Return whether a live process updates a mark; waits for an update. No clocks of two hosts are compared."""
    first, deadline = os.stat(mark).st_mtime_ns, time.monotonic() + _DEAD_AFTER
    while time.monotonic() < deadline:
        time.sleep(min(1.0, _UPDATE_INTERVAL))
        with suppress(FileNotFoundError):
            if os.stat(mark).st_mtime_ns != first:
                return True
    return False


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether an open file still has this path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False
