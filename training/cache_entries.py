"""The entries of the cache of prepared data: where they are, what is among them, and their removal.

Imports nothing heavy.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from data_utils.sources import parse_source
from errors import ConfigError
from outputs import check_shared_folder
from ownership import has_mark, make_temporary_folder
from training.config.args import DataArguments

logger = logging.getLogger(__name__)

FLAG = "--data_cache_dir"
ABOUT = "about.json"
"""File of an entry that describes it. Its time of change is that of the last use; users of the entry lock it."""

PARTIAL = ".partial"
FORMAT = "qwen-finetuning data 1"
_NAME = re.compile(r"[0-9a-f]{32}(\.partial)?")


def default_folder() -> Path:
    """Return the folder of the cache in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base if base and os.path.isabs(base) else Path("~/.cache").expanduser()) / "qwen-finetuning" / "data"


def usable_folder(data: DataArguments) -> Path | None:
    """Return the folder of ``--data_cache_dir``, or the default; ``None`` if the default cannot be used.

    A given folder that cannot be written to is returned if it has entries, which can be used.

    Raises:
        ConfigError: the given folder is inside a folder of data, or cannot be written to and has no entries.
    """
    given = data.data_cache_dir
    folder = default_folder() if given is None else Path(given).expanduser()
    try:
        _check_outside_data(folder, data)
        try:
            check_shared_folder(folder, FLAG)
        except ConfigError:
            if given is None or not find_entries(folder):
                raise
    except ConfigError as error:
        if given is not None:
            raise
        logger.warning("Prepared data is not kept: %s", error)
        return None
    return folder


def _check_outside_data(folder: Path, data: DataArguments) -> None:
    """Raise ``ConfigError`` for a folder whose entries would be read as data; those in hidden folders are not."""
    real = Path(os.path.realpath(folder))
    for flag, names in (("--data_path", data.data_path), ("--eval_data_path", data.eval_data_path)):
        for name in names or ():
            try:
                source = Path(os.path.realpath(parse_source(name, flag).path))
            except ConfigError:
                continue  # reported with the other faults
            if not source.is_dir() or not real.is_relative_to(source):
                continue
            if not any(part.startswith(".") for part in real.relative_to(source).parts):
                what = f"{FLAG} {folder} is inside {flag} {name}, where it would be read as data"
                raise ConfigError(what, "Give a folder outside of it")


@dataclass(frozen=True)
class Entry:
    """An entry of the cache, or what a process leaves that died while it prepared one.

    Attributes:
        size: bytes of its files.
        used: time of its last use, in seconds since the epoch.
        sources: its data, each with the name of its set.
    """

    path: Path
    size: int
    used: float
    model: str
    sources: list[str]

    def remove(self) -> None:
        """Remove it.

        Raises:
            ConfigError: a process uses it.
        """
        if self.path.suffix == PARTIAL:
            make_temporary_folder(self.path, str(self.path)).remove()
            return
        try:
            descriptor = os.open(self.path / ABOUT, os.O_RDONLY)
        except FileNotFoundError:  # damaged, and so in use by nobody
            shutil.rmtree(self.path)
            return
        try:
            with suppress(OSError):
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise ConfigError(f"{self.path} is in use", "Wait for the end of that process") from None
            shutil.rmtree(self.path)
        finally:
            os.close(descriptor)


def find_entries(cache: Path) -> list[Entry]:
    """Return the entries of a cache, the one that was used last first. Other files and folders are left out."""
    entries = [entry for path in cache.glob("*") if _NAME.fullmatch(path.name) and (entry := _read_entry(path))]
    return sorted(entries, key=lambda entry: entry.used, reverse=True)


def _read_entry(path: Path) -> Entry | None:
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    if path.suffix == PARTIAL:
        return Entry(path, size, path.stat().st_mtime, "", ["not complete"]) if has_mark(path) else None
    if not is_entry(path):
        return None
    try:
        used = (path / ABOUT).stat().st_mtime
        about = json.loads((path / ABOUT).read_text(encoding="ascii"))
        model, sources = str(about["model"]), [str(source) for source in about["sources"]]
    except (OSError, ValueError, KeyError, TypeError):
        return Entry(path, size, path.stat().st_mtime, "", ["damaged"])
    return Entry(path, size, used, model, sources)


def is_entry(path: Path) -> bool:
    """Return whether a path is a folder with the files of an entry, possibly damaged."""
    from data_utils.prepared import INDEX

    return path.is_dir() and not path.is_symlink() and any((path / name).is_file() for name in (ABOUT, INDEX))
