"""``manifest.json`` of a ``checkpoint-N``: facts about its run, and size and checksum of every file.

It is written last, before the staged folder is renamed, so a checkpoint with a manifest was complete; by its checksums
it can be verified to be intact. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from checkpoints.files import load_json, save_json
from checkpoints.json_schemas import Schema, schema_of
from errors import ConfigError
from training.run_folder.names import CHECKPOINT, MANIFEST, TRAINER_STATE

logger = logging.getLogger(__name__)

MANIFEST_VERSION = 1
_BLOCK_BYTES = 1 << 20
_MAX_THREADS = 8

Manifest = dict[str, Any]


class DamagedError(Exception):
    """A checkpoint that is incomplete or was changed after it was written; the message names the file."""


def checkpoints_in(output: Path) -> list[Path]:
    """Return the folders ``checkpoint-N`` of a run, latest step first; their content is not checked."""
    entries = output.iterdir() if output.is_dir() else ()
    checkpoints = [path for path in entries if CHECKPOINT.fullmatch(path.name) and path.is_dir()]
    return sorted(checkpoints, key=step_of, reverse=True)


def newest_checkpoint(output: Path) -> Path | None:
    """Return the ``checkpoint-N`` with the highest step and a trainer state; whether it is intact is not checked."""
    return next((path for path in checkpoints_in(output) if (path / TRAINER_STATE).is_file()), None)


def step_of(checkpoint: Path) -> int:
    """Return N of a folder ``checkpoint-N``."""
    match = CHECKPOINT.fullmatch(checkpoint.name)
    assert match is not None, f"{checkpoint} is not the name of a checkpoint"
    return int(match[1])


def write_manifest(folder: Path, step: int, facts: Mapping[str, Any]) -> None:
    """Write the manifest of a checkpoint that is otherwise complete; reads every file for its checksum.

    Args:
        facts: of the run, see :mod:`training.run_folder.changes`.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = {path: path.stat().st_size for path in paths}
    digests = _digests(paths)
    files = {str(path.relative_to(folder)): {"size": sizes[path], "sha256": digests[path]} for path in paths}
    written = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    content = {"format": MANIFEST_VERSION, "step": step, "written": written, **facts, "files": files}
    content = json.loads(json.dumps(content, default=str))
    save_json({**content, "checksum": _checksum(content)}, folder / MANIFEST)


def load_manifest(checkpoint: Path) -> Manifest:
    """Return a checkpoint's manifest; the other files are not checked.

    Raises:
        DamagedError: the manifest is missing, or was changed after it was written.
        ConfigError: a newer version of this toolkit wrote it.
    """
    path = checkpoint / MANIFEST
    if not os.path.lexists(path):
        raise DamagedError(f"it has no {MANIFEST}")
    try:
        content = load_json(path, Schema(has_nan=True))  # that of a newer version may have another schema
    except ConfigError as error:
        raise DamagedError(f"{MANIFEST} cannot be read") from error
    if content.pop("checksum", None) != _checksum(content):
        raise DamagedError(f"{MANIFEST} was changed after it was written")
    version = content.get("format")
    if isinstance(version, int) and version > MANIFEST_VERSION:
        raise ConfigError(
            f"{checkpoint / MANIFEST}: format {version} is of a newer version of this toolkit "
            f"(this version reads {MANIFEST_VERSION})",
            "Resume with that version, or give another --output_dir",
        )
    if fault := schema_of(MANIFEST).rule.find_fault(content, ""):
        raise DamagedError(f"{MANIFEST} was changed after it was written: {fault}")
    return content


def saved_arguments(checkpoint: Path) -> dict[str, Any]:
    """Return the arguments of the run that saved a checkpoint; empty without a manifest."""
    try:
        return dict(load_manifest(checkpoint).get("arguments") or {})
    except DamagedError:
        return {}


def check_intact(checkpoint: Path, manifest: Manifest) -> None:
    """Compare the files with the manifest: first all sizes, then all checksums, which takes longer.

    Raises:
        DamagedError: a file is missing, or was changed after it was written.
    """
    files: dict[str, dict[str, Any]] = manifest["files"]
    for name, expected in files.items():
        path = checkpoint / name
        if not os.path.isfile(path):
            raise DamagedError(f"{name} is missing")
        if (size := path.stat().st_size) != expected["size"]:
            raise DamagedError(f"{name} has {size:,} of {expected['size']:,} bytes")
    try:
        digests = _digests([checkpoint / name for name in files])
    except OSError as error:
        raise DamagedError(f"{error.filename} cannot be read ({error.strerror})") from error
    for name, expected in files.items():
        if digests[checkpoint / name] != expected["sha256"]:
            raise DamagedError(f"{name} was changed after it was written (its checksum differs)")


def newest_intact_checkpoint(output: Path) -> tuple[Path, Manifest] | None:
    """Return the intact checkpoint of the latest step, with its manifest; log those that are skipped.

    Raises:
        ConfigError: a newer version of this toolkit wrote the newest one.
    """
    for checkpoint in checkpoints_in(output):
        try:
            manifest = load_manifest(checkpoint)
            check_intact(checkpoint, manifest)
        except DamagedError as error:
            logger.warning("%s is incomplete or damaged and is skipped: %s", checkpoint, error)
        else:
            return checkpoint, manifest
    return None


def _digests(paths: list[Path]) -> dict[Path, str]:
    """Return the SHA-256 of files, computed in threads: hashlib releases the interpreter lock."""
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        return dict(zip(paths, pool.map(_digest, paths), strict=True))


def _digest(path: Path) -> str:
    digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        while length := file.readinto(block):
            digest.update(block[:length])
    return digest.hexdigest()


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
