"""Checkpoints and results, staged in a hidden folder of the run folder and renamed when they are complete.

Unlike ``checkpoints.folders.staged_folder``, which makes a new folder, these replace files and checkpoints of an
existing one, and several ranks can fill one checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from checkpoints.folders import sync_files, temporary_folder
from training.run_folder.names import STAGING


@contextmanager
def staged_checkpoint(final: Path, is_writer: bool = True) -> Iterator[Path]:
    """Stage a ``checkpoint-N`` in a hidden folder; it is renamed to its final path when the block succeeds.

    Args:
        final: final path. An earlier folder there is replaced then, not before.
        is_writer: whether this rank makes and renames the folder; the others only get its path.

    Yields:
        The folder to fill, of the same name.
    """
    staging = final.parent / STAGING
    staged = staging / final.name
    with temporary_folder(staging) if is_writer else nullcontext():
        yield staged
        if is_writer:
            sync_files(staged)
            if final.exists():
                os.replace(final, staging / "replaced")
            os.replace(staged, final)


@contextmanager
def staged_files(folder: Path) -> Iterator[Path]:
    """Stage files in a hidden folder; they are moved to ``folder`` when all of them are on disk.

    After an error in the block ``folder`` is unchanged.

    Yields:
        The folder to write to.
    """
    with temporary_folder(folder / STAGING) as staging:
        yield staging
        sync_files(staging)
        for path in sorted(staging.iterdir()):
            os.replace(path, folder / path.name)
