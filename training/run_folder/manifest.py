"""``manifest.json`` in a ``checkpoint-N``: of which run it is, and every file with its size and checksum.

It is written last, before the folder gets its place, so a checkpoint that has one was whole; what it says tells whether
the checkpoint still is. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from checkpoints.files import save_json
from errors import ConfigError
from training.run_folder.names import TRAINER_STATE

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
CHECKPOINT = re.compile(r"checkpoint-(\d+)")  # the folder's name
_BLOCK = 1 << 20
_MOST_THREADS = 8

Manifest = dict[str, Any]


class DamagedError(Exception):
    """A checkpoint that is not what was written; the text says why."""


def checkpoints_in(output: Path) -> list[Path]:
    """The folders ``checkpoint-N`` of a run, those of the latest steps first, whatever is in them."""
    found = [path for path in (output.iterdir() if output.is_dir() else ()) if CHECKPOINT.fullmatch(path.name)]
    return sorted((path for path in found if path.is_dir()), key=step_of, reverse=True)


def newest_checkpoint(output: Path) -> Path | None:
    """Return the ``checkpoint-N`` with the highest step and a trainer state; whether it is whole is not checked."""
    return next((path for path in checkpoints_in(output) if (path / TRAINER_STATE).is_file()), None)


def step_of(checkpoint: Path) -> int:
    """N of a folder ``checkpoint-N``."""
    match = CHECKPOINT.fullmatch(checkpoint.name)
    assert match is not None, f"{checkpoint} is no checkpoint's name"
    return int(match[1])


def write_manifest(folder: Path, step: int, facts: Mapping[str, Any]) -> None:
    """Read every file of a checkpoint that is complete otherwise, and write what they are.

    Args:
        facts: what else the checkpoint is known by; see :mod:`training.run_folder.changes`.
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
    """What a checkpoint says of itself. Its files are not looked at.

    Raises:
        DamagedError: there is no manifest, or it is not as it was written.
        ConfigError: a newer version of this toolkit wrote it.
    """
    try:
        content = json.loads((checkpoint / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise DamagedError(f"it has no {MANIFEST}") from None
    except (OSError, ValueError) as error:
        raise DamagedError(f"{MANIFEST} cannot be read") from error
    if not isinstance(content, dict) or content.pop("checksum", None) != _checksum(content):
        raise DamagedError(f"{MANIFEST} is not as it was written")
    if content["format"] > MANIFEST_VERSION:
        raise ConfigError(
            f"{checkpoint / MANIFEST}: format {content['format']}, of a newer version of this toolkit "
            f"(this one knows {MANIFEST_VERSION})",
            "Go on with that version, or give another --output_dir",
        )
    return content


def check_whole(checkpoint: Path, manifest: Manifest) -> None:
    """Compare the files with the manifest: the sizes of all, then, which takes longer, the checksums.

    Raises:
        DamagedError: the first file that is missing, or is not as it was written.
    """
    files: dict[str, dict[str, Any]] = manifest["files"]
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            raise DamagedError(f"{name} is missing")
        if (size := path.stat().st_size) != expected["size"]:
            raise DamagedError(f"{name} has {size:,} of {expected['size']:,} bytes")
    try:
        digests = _digests([checkpoint / name for name in files])
    except OSError as error:
        raise DamagedError(f"{error.filename} cannot be read ({error.strerror})") from error
    for name, expected in files.items():
        if digests[checkpoint / name] != expected["sha256"]:
            raise DamagedError(f"the content of {name} is not what was written (its checksum differs)")


def newest_whole_checkpoint(output: Path) -> tuple[Path, Manifest] | None:
    """The checkpoint of the latest step that is as it was written. Those that are not are said in the log.

    Raises:
        ConfigError: the newest was written by a newer version of this toolkit.
    """
    for checkpoint in checkpoints_in(output):
        try:
            manifest = load_manifest(checkpoint)
            check_whole(checkpoint, manifest)
        except DamagedError as error:
            logger.warning("%s is not whole and is left out: %s", checkpoint, error)
        else:
            return checkpoint, manifest
    return None


def _digests(paths: list[Path]) -> dict[Path, str]:
    """SHA-256 of files, several at a time: hashing lets other threads run."""
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        return dict(zip(paths, pool.map(_digest, paths), strict=True))


def _digest(path: Path) -> str:
    digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while length := file.readinto(block):
            digest.update(block[:length])
    return digest.hexdigest()


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
