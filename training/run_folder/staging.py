"""Checkpoints and results, staged in a hidden folder of the run folder and renamed when they are complete.

Unlike ``checkpoints.folders.staged_folder``, which makes a new folder, these replace files and checkpoints of an
existing one, and several ranks can fill one checkpoint.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from checkpoints.folders import sync_files, temporary_folder
from checkpoints.names import ADAPTER_CONFIG
from outputs import sync
from training.run_folder.names import RUN_WEIGHTS, STAGING

# Loaders recognise a model or an adapter by these files: a folder without them contains nothing that can be loaded.
_ENTRIES = ("config.json", ADAPTER_CONFIG)

_CURRENT_FOLDER, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


@contextmanager
def staged_checkpoint(
    final: Path, is_writer: bool = True, superseded: Callable[[], Iterable[Path]] = tuple
) -> Iterator[Path]:
    """Stage a ``checkpoint-N`` in a hidden folder; it is renamed to its final path when the block succeeds.

    Args:
        final: final path. An earlier folder there is replaced then, not before.
        is_writer: whether this rank makes and renames the folder; the others only get its path.
        superseded: called when it is complete; returns the checkpoints that it supersedes. They are moved to the
            hidden folder and removed with it, so that a process that is killed leaves no part of one beside the others.

    Yields:
        The folder to fill, of the same name.
    """
    staging = final.parent / STAGING
    staged = staging / final.name
    with temporary_folder(staging) if is_writer else nullcontext():
        yield staged
        if is_writer:
            sync_files(staged)
            replace_folder(staged, final)
            for path in superseded():
                with suppress(OSError):
                    os.replace(path, staging / path.name)


@contextmanager
def staged_files(folder: Path) -> Iterator[Path]:
    """Stage a model or an adapter in a hidden folder; it is moved to ``folder`` when all of it is on disk.

    After an error in the block ``folder`` is unchanged. A process that is killed while the files are moved leaves the
    earlier model, the new one, or a folder that no loader takes for a model.

    Yields:
        The folder to write to.
    """
    with temporary_folder(folder / STAGING) as staging:
        yield staging
        sync_files(staging)
        _move(staging, folder)


def _move(staging: Path, folder: Path) -> None:
    """Move everything in ``staging``: the weights after tokenizer and settings, then what loaders look for."""
    names = {path.name for path in staging.iterdir()}
    weights = {name for name in names if RUN_WEIGHTS.fullmatch(name)}
    obsolete = [path for path in folder.iterdir() if weights and RUN_WEIGHTS.fullmatch(path.name)]
    obsolete = [path for path in obsolete if path.name not in names]
    if len(weights) > 1 or obsolete:
        # Several files cannot be replaced in one step.
        for name in _ENTRIES:
            (folder / name).unlink(missing_ok=True)
        for path in obsolete:
            path.unlink()
    for name in sorted(names, key=lambda name: (name in _ENTRIES, name in weights, name)):
        replace = replace_folder if (staging / name).is_dir() else os.replace
        replace(staging / name, folder / name)
    sync(folder)


def replace_folder(new: Path, final: Path) -> None:
    """Rename a folder to ``final``; an earlier folder there gets the name of the new one, in the same step."""
    if not final.exists():
        os.replace(new, final)
    elif not exchange_folders(new, final):
        earlier = new.with_name(f"{new.name}.replaced")
        os.replace(final, earlier)
        os.replace(new, final)


def exchange_folders(first: Path, second: Path) -> bool:
    """Exchange the names of two folders in one step; return whether the system could."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)  # glibc 2.28 and musl 1.2.5 on Linux
    if rename is None:
        return False
    return bool(rename(_CURRENT_FOLDER, os.fsencode(first), _CURRENT_FOLDER, os.fsencode(second), _EXCHANGE) == 0)
