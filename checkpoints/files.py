"""Single files: JSON and text, written in one step; needs no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from errors import ConfigError


def load_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ConfigError: the file is missing or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", "Check the folder's name") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}", "Copy the file again") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a {type(value).__name__}, not a JSON object", "Copy the file again")
    return value


def load_json_or_empty(path: Path) -> dict[str, Any]:
    """Read a JSON object; return ``{}`` if the file is missing or is not a JSON object."""
    try:
        return load_json(path)
    except ConfigError:
        return {}


def save_json(value: Mapping[str, Any], path: Path) -> None:
    """Write a JSON object in one step (see :func:`staged_file`)."""
    save_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", path)


def save_text(text: str, path: Path) -> None:
    """Write a UTF-8 text file in one step (see :func:`staged_file`)."""
    with staged_file(path) as staging:
        staging.write_text(text, encoding="utf-8")


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """Write a file in one step: at any time ``path`` is the previous file or the complete new one.

    Yields the hidden path ``.NAME.partial`` in the same folder, where the block writes and closes the file. After the
    block the file is synced to disk and renamed to ``path``. After an error in the block (Ctrl-C too) the partial file
    is removed and ``path`` is unchanged. A killed process leaves its partial file; the next write replaces it.
    """
    staging = path.with_name(f".{path.name}.partial")
    try:
        yield staging
        sync(staging)
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of entries, from the operating system's cache to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
