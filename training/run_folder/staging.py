"""Write checkpoints and results beside their place, then rename them."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from checkpoints.folders import remove_folder, sync_files
from errors import ConfigError, RunError, one_line

# What is being written lies here until it is whole.
STAGING = ".saving"


@contextmanager
def saving_errors(folder: Path) -> Iterator[None]:
    """Turn what goes wrong while a run saves into one ``RunError`` that names the folder."""
    try:
        yield
    except RunError:
        raise
    except (OSError, RuntimeError, ConfigError) as error:
        if isinstance(error, RuntimeError):
            # torch.save has no error of its own for a full disk.
            if not re.search("PytorchStreamWriter|inline_container", str(error)):
                raise
            reason = "torch.save could not write all of a file"
        else:
            cause = (isinstance(error, ConfigError) and error.__cause__) or error
            reason = (isinstance(cause, OSError) and cause.strerror) or one_line(cause)
        place = Path(*(part for part in folder.parts if part != STAGING))
        raise RunError(
            f"cannot save to {place} ({reason})", "Free some space there; what was saved before is as it was"
        ) from error


@contextmanager
def staged_checkpoint(final: Path, is_writer: bool = True) -> Iterator[Path]:
    """Let a ``checkpoint-N`` be filled in a hidden folder; it gets its place when the block ends well.

    Args:
        final: where it belongs. An earlier folder there is replaced then, not before.
        is_writer: whether this process makes and moves the folder; the others only learn its name.

    Yields:
        The folder to fill, of the same name.
    """
    staging = final.parent / STAGING
    staged, replaced = staging / final.name, staging / "replaced"
    if is_writer:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    try:
        yield staged
        if is_writer:
            sync_files(staged)
            if final.exists():
                os.replace(final, replaced)
            os.replace(staged, final)
    finally:
        if is_writer:
            remove_folder(staging)


@contextmanager
def staged_files(folder: Path) -> Iterator[Path]:
    """Let files be written to a hidden folder; they take their places in ``folder`` when all of them are on disk.

    After an error ``folder`` holds what it held before.
    """
    staging = folder / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        sync_files(staging)
        for path in sorted(staging.iterdir()):
            os.replace(path, folder / path.name)
    finally:
        remove_folder(staging)
