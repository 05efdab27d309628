"""The cache of prepared data: a folder with one entry for each fingerprint of files, tokenizer, code and options.

An entry is written beside its name and renamed, so it is always complete. A process that needs an entry which another
one prepares waits for it; a dead preparer's lock is free, and its folder is removed.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_utils.dataset import DataReader
from data_utils.prepared import Prepared, explained_full_disk, log_again, open_prepared, prepare, report_on
from data_utils.store import DamagedError
from errors import ConfigError, DataError
from outputs import check_writable
from ownership import NotOursError, OwnedFolder, make_temporary_folder
from training.cache_entries import ABOUT, FLAG, FORMAT, PARTIAL, is_entry
from training.distributed.agreement import CONFIG_FILES, digest_files, digest_sources

if TYPE_CHECKING:
    from loading.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

ROOT = Path(__file__).parents[1]
# What reads, renders, checks, tokenises and reports on records.
_CODE = ("chat", "data_utils", "qwen_model", "loading", "training/data.py", "console.py", "errors.py")
_LIBRARIES = ("tokenizers", "tiktoken", "transformers", "pyarrow", "numpy")
_BLOCK_BYTES = 1 << 20
_WAIT = 0.2  # seconds between two looks at an entry that another process prepares


# ---------------------------------------------------------------------------------------------------- fingerprint


def ingredients(reader: DataReader, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return everything that the examples and reports of a run depend on, as JSON values.

    Paths are part of it, because examples and reports name them; so are samples that reports show.

    Raises:
        DataError: a data file that cannot be read.
    """
    encoder, options = reader.encoder, asdict(reader.options)
    if not reader.options.eval_share and not any(source.is_drawn for _, source in reader.sources):
        del options["seed"]  # it decides nothing
    return {
        "format": FORMAT,
        "code": digest_sources(ROOT, _CODE),
        "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "python": platform.python_version(),
        "tokenizer": digest_files(checkpoint.folder, *CONFIG_FILES),
        "families": [asdict(encoder.family), asdict(encoder.rules.plain)],
        "encoding": asdict(encoder.options),
        "options": options,
        "max_samples": reader.max_samples,
        "sources": [
            [set_name, source.name, source.sample, source.factor, [[str(path), *_digest(path)] for path in files]]
            for (set_name, source), files in zip(reader.sources, reader.files, strict=True)
        ],
    }


def fingerprint(values: dict[str, Any]) -> str:
    """Return the fingerprint of ``ingredients``, 32 hex digits: the name of the entry."""
    text = json.dumps(values, sort_keys=True, default=lambda value: type(value).__name__)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _digest(path: Path) -> tuple[int, str]:
    """Return the size and the SHA-256 of a file."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
            return file.tell(), digest.hexdigest()
    except OSError as error:
        raise DataError(str(path), f"cannot be read ({error.strerror})") from None


# -------------------------------------------------------------------------------------------- one entry, by a run


def find_or_prepare(cache: Path, reader: DataReader, checkpoint: Checkpoint) -> Prepared:
    """Open the entry of a run's data, after preparing it if there is none.

    Raises:
        DataError: records that cannot be used, a set without any example, or a file that changes while it is read.
        ConfigError: something of the user is in the way.
    """
    values = ingredients(reader, checkpoint)
    entry, prepared, is_new = cache / fingerprint(values), None, False
    with suppress(DamagedError):
        prepared = _open(entry, reader)
    if prepared is None:
        _check_free(cache, entry)
    while prepared is None:
        with _staging(cache, entry) as staging, explained_full_disk(cache, f"set {FLAG} to use another folder"):
            try:
                prepared = _open(entry, reader)  # another process may have completed it meanwhile
            except DamagedError as error:
                logger.warning("Prepared data is damaged and is prepared again: %s", error)
            if prepared is None:
                _prepare(staging.path / entry.name, entry, reader, checkpoint, values)
                prepared, is_new = _open(entry, reader), True
    if not is_new:
        logger.info("Data that was prepared before is used: %s (--no_data_cache prepares it anew)", entry)
        log_again(entry)
    try:
        report_on(prepared.sets)
    except BaseException:
        prepared.release()
        raise
    return prepared


def _check_free(cache: Path, entry: Path) -> None:
    """Check that an entry can be written: the folder is writable, and nothing else has the entry's name.

    Raises:
        ConfigError: names what is in the way.
    """
    check_writable(cache, f"{FLAG} {cache}, which has no entry for this data")
    if os.path.lexists(entry) and not is_entry(entry):
        raise ConfigError(f"{FLAG} {cache}: {entry} is no entry of the cache", "Move it away, or give another folder")


def _staging(cache: Path, entry: Path) -> OwnedFolder:
    """Make the temporary folder of an entry; wait while another process has it.

    Raises:
        NotOursError: something of the user is there.
    """
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    is_waiting = False
    while True:
        try:
            return make_temporary_folder(entry.with_suffix(PARTIAL), f"{FLAG} {cache}")
        except NotOursError:
            raise
        except ConfigError:
            if not is_waiting:
                logger.info("Waiting for another process, which prepares the same data in %s", cache)
            is_waiting = True
            time.sleep(_WAIT)


def _prepare(folder: Path, entry: Path, reader: DataReader, checkpoint: Checkpoint, values: dict[str, Any]) -> None:
    """Prepare an entry in ``folder``, and rename it."""
    folder.mkdir()
    prepare(reader, folder)
    if ingredients(reader, checkpoint) != values:
        raise DataError("--data_path", "a file changed while it was read", "Start again when nothing writes to it")
    sources = [f"{set_name}: {source.name}" for set_name, source in reader.sources]
    about = {"format": FORMAT, "model": checkpoint.name, "sources": sources}
    (folder / ABOUT).write_text(json.dumps(about), encoding="ascii")
    if os.path.lexists(entry):  # damaged
        shutil.rmtree(entry)
    os.rename(folder, entry)
    logger.info("Prepared data is kept in %s (--no_data_cache keeps none)", entry)


def _open(entry: Path, reader: DataReader) -> Prepared | None:
    """Return an entry, open and locked against removal until its release; ``None`` if there is none.

    Raises:
        DamagedError: a file is missing or has been changed.
    """
    try:
        descriptor = os.open(entry / ABOUT, os.O_RDONLY)
    except OSError:
        return None
    try:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        sets = open_prepared(entry, reader)
        with suppress(OSError):
            os.utime(entry / ABOUT)
    except BaseException:
        os.close(descriptor)
        raise
    return Prepared(sets, entry, lambda: os.close(descriptor))
