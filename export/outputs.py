"""Writing a folder: whether it can be done, asked before anything is written, and how far it is."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from checkpoints.source import TensorSource
from errors import ConfigError


def check_apart(output: Path, inputs: Mapping[str, Iterable[Path]], flag: str = "--output") -> None:
    """What is read stays as it is: nothing is written into it.

    Args:
        inputs: folders by the flag that named them.
        flag: that named ``output``.

    Raises:
        ConfigError: ``output`` is one of them, or lies within.
    """
    for named, folders in inputs.items():
        for folder in folders:
            if folder.resolve() in (output.resolve(), *output.resolve().parents):
                where = "is" if folder.resolve() == output.resolve() else "lies in"
                raise ConfigError(f"{flag} {output} {where} the folder of {named}", "Give a new folder beside it")


def check_space(source: TensorSource, output: Path, flag: str = "--output") -> None:
    """Raise ``ConfigError`` if the disk of ``output`` has no room for the tensors of ``source``."""
    needed = sum(source.nbytes(name) for name in source.names())
    folder = next(parent for parent in output.resolve().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if needed > free:
        what = f"{flag} {output} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        raise ConfigError(what, "Free some space or choose another disk")


def progress_bar(source: TensorSource, doing: str) -> Any:
    """A bar over the bytes that the tensors of ``source`` are written in."""
    total = sum(source.nbytes(name) for name in source.names())
    return tqdm(total=total, desc=doing, unit="B", unit_scale=True)
