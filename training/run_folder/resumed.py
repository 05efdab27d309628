"""Files of a checkpoint that a run resumes from: those that its manifest names, and no others.

Libraries look for files by name, and some prefer a file that nobody saved to the one that the run did. So they get a
temporary folder with links to the files of the checkpoint. Paths that a checkpoint contains are of the time when it was
saved: the folder may have been moved, and another run may be at the old path. They are not read; the best checkpoint is
found by its name beside the one that is resumed.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path, PurePath
from typing import Any

from checkpoints.files import load_json
from errors import ConfigError, RunError, one_line
from training.run_folder.manifest import DamagedError, Manifest, load_manifest
from training.run_folder.names import CHECKPOINT, MANIFEST, TRAINED_VALUES, TRAINER_STATE

_WEIGHTS = (
    rf"{re.escape(TRAINED_VALUES)}"
    r"|(adapter_model|model(-\d{5}-of-\d{5})?|pytorch_model(-\d{5}-of-\d{5})?)\.(safetensors|bin)(\.index\.json)?"
)
_STATES = r"(optimizer|scheduler|scaler)\.pt|rng_state(_\d+)?\.pth"
_DEEPSPEED = r"latest|global_step\d+/[^/]+\.pt"
_FSDP = r"(pytorch_model_fsdp|optimizer)(_\d+)?(\.bin|/(\.metadata|[^/]+\.distcp))"
_READ = re.compile(rf"{re.escape(TRAINER_STATE)}|{_WEIGHTS}|{_STATES}|{_DEEPSPEED}|{_FSDP}")
"""Files that libraries read when a run resumes; the others (tokenizer, configs) are for other programs."""

_ANOTHER = "Give an earlier checkpoint"
_OTHER_CAUSES = ("can't allocate memory", "gloo", "NCCL", "closed by peer", "timed out")


def find_files(checkpoint: Path) -> list[str]:
    """Return the files of a checkpoint that a resumed run reads: named by its manifest or, without one, all there are.

    Raises:
        DamagedError: the manifest is damaged.
    """
    if (checkpoint / MANIFEST).exists():
        names = list(load_manifest(checkpoint)["files"])
    else:
        names = [path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()]
    return sorted(name for name in names if _READ.fullmatch(name))


def find_unnamed(checkpoint: Path, manifest: Manifest) -> list[str]:
    """Return the files in a checkpoint's folder that its manifest does not name."""
    files = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if not path.is_dir()}
    return sorted(files - {*manifest["files"], MANIFEST})


def load_state(checkpoint: Path) -> dict[str, Any]:
    """Return the trainer's state in a checkpoint.

    Raises:
        ConfigError: it cannot be read, or has a key that transformers does not know: it takes each as an argument.
    """
    from transformers import TrainerState

    state = load_json(checkpoint / TRAINER_STATE)
    if unknown := state.keys() - {item.name for item in fields(TrainerState)}:
        raise ConfigError(f"{checkpoint / TRAINER_STATE} has the unknown key {min(unknown)}", _ANOTHER)
    return state


def find_best(checkpoint: Path, state: Mapping[str, Any]) -> Path | None:
    """Return where the best checkpoint so far is, or should be: beside the one that is resumed.

    Args:
        state: the trainer's state in ``checkpoint``.
    """
    name = PurePath(state.get("best_model_checkpoint") or "").name
    match = CHECKPOINT.fullmatch(name)
    if match is None:
        return None
    if int(match[1]) == state.get("global_step"):  # it is this one, whatever its name is now
        return checkpoint
    # A symbolic link to a checkpoint has other neighbours.
    return (checkpoint.resolve() if checkpoint.is_symlink() else checkpoint).parent / name


@contextmanager
def linked_checkpoint(checkpoint: Path) -> Iterator[Path]:
    """Yield a temporary folder that contains a checkpoint's files as links, and the trainer's state with valid paths.

    Raises:
        ConfigError: the checkpoint cannot be read; errors of libraries in :func:`reading` name it.
    """
    try:
        names = find_files(checkpoint)
    except DamagedError as error:
        raise ConfigError(f"{checkpoint} is incomplete or damaged, {error}", _ANOTHER) from error
    with _temporary_folder() as folder:
        for file in names:
            link = folder / file
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to((checkpoint / file).resolve())
        state = load_state(checkpoint)
        best = find_best(checkpoint, state)
        state["best_model_checkpoint"] = str(best) if best is not None and best.is_dir() else None
        # The trainer takes these from its arguments again; transformers would warn of other values, defaults too.
        state |= dict.fromkeys(("logging_steps", "eval_steps", "save_steps"))
        (folder / TRAINER_STATE).unlink(missing_ok=True)
        (folder / TRAINER_STATE).write_text(json.dumps(state), encoding="utf-8")
        yield folder


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    try:
        folder = tempfile.TemporaryDirectory(prefix="qwen-checkpoint-")
    except OSError as error:
        raise ConfigError(f"there is no folder for temporary files ({one_line(error)})", "Set TMPDIR to one") from error
    with folder as name:
        yield Path(name)


@contextmanager
def reading(checkpoint: Path, folder: Path, what: str) -> Iterator[None]:
    """Turn an error of a library that reads a checkpoint into one ``ConfigError``.

    Args:
        checkpoint: its folder, for messages.
        folder: the folder with links that the library reads.
        what: what is read.

    Raises:
        ConfigError: the files are damaged, or do not fit the run.
    """
    try:
        yield
    except ConfigError as error:
        raise ConfigError(str(error).replace(str(folder), str(checkpoint))) from error
    except (RunError, MemoryError):
        raise
    except Exception as error:  # what libraries raise for arbitrary content has no common class
        if _is_of_another_cause(error):
            raise
        reason = f"{type(error).__name__}: {one_line(error)}".replace(str(folder), str(checkpoint))
        raise ConfigError(
            f"--resume_from_checkpoint {checkpoint}: {what} cannot be restored ({reason})", _ANOTHER
        ) from error


def _is_of_another_cause(error: Exception) -> bool:
    """Return whether memory or another process failed, not the files."""
    name = type(error).__name__
    return name == "OutOfMemoryError" or name.startswith("Dist") or any(word in str(error) for word in _OTHER_CAUSES)
