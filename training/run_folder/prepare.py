"""Checks before a run writes to its output folder, and the removal of what an earlier run left there."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from checkpoints.names import RUN_ARGUMENTS, RUN_SUMMARY
from data_utils.sources import parse_source
from errors import ConfigError
from processes import is_first
from training.config.args import RunArguments
from training.run_folder.manifest import newest_checkpoint
from training.run_folder.names import (
    CHECKPOINT,
    MANIFEST,
    OWNERSHIP_RECORDS,
    RUN_FILE,
    RUN_SUBFOLDERS,
    STAGING,
    TRAINER_STATE,
)
from training.run_folder.start import resumed_checkpoint, starts_over

logger = logging.getLogger(__name__)


def check_output(args: RunArguments) -> None:
    """Check that a run may write to its output folder; change nothing.

    Rank 0 checks alone: the others might see that it removes and writes already.

    Raises:
        ConfigError: the folder is a file, is not writable, is an input's folder, inside or around one, or is not empty.
            It may contain the checkpoint that is resumed, or a run that ``--overwrite_output_dir`` removes or that
            ``--resume_from_checkpoint auto`` may resume.
    """
    if not is_first():
        return
    output = args.output_dir
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output_dir {output} is a file", "Give a folder")
    _check_outside_inputs(args)
    _check_writable(output)
    resumed = resumed_checkpoint(args)
    if starts_over(args):
        if resumed is not None and _is_inside(Path(resumed), output):
            raise ConfigError(
                f"--overwrite_output_dir would remove the checkpoint of --resume_from_checkpoint {resumed}",
                "Leave one of them out",
            )
        find_removable(output)
    elif output.is_dir() and any(output.iterdir()) and (resumed is None or not _is_inside(Path(resumed), output)):
        if args.resumes_automatically and (
            (output / RUN_ARGUMENTS).is_file() or all(path.name.startswith(".") for path in output.iterdir())
        ):
            return  # compared with this run when its data is known, see training.run_folder.start
        raise ConfigError(f"--output_dir {output} is not empty", _alternatives(output))


def prepare_output(args: RunArguments, removes_leftovers: bool = False) -> None:
    """Check the output folder, then remove what the run does not continue.

    With ``--overwrite_output_dir`` that is everything of an earlier run, otherwise the summary of one that had ended.

    Args:
        removes_leftovers: also remove what this run wrote before it died without a checkpoint.

    Raises:
        ConfigError: see :func:`check_output`; nothing has been removed then.
    """
    check_output(args)
    output = args.output_dir
    if not is_first() or not output.is_dir():
        return
    entries = [output / RUN_SUMMARY] if (output / RUN_SUMMARY).is_file() else []
    if starts_over(args):
        entries = find_removable(output)
        if entries:
            logger.info("--overwrite_output_dir: removing %d files and folders of an earlier run", len(entries))
    elif removes_leftovers:
        entries = _records_last(path for path in output.iterdir() if _is_written_by_runs(path))
    for path in entries:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def find_removable(output: Path) -> list[Path]:
    """Return what an earlier run left in a folder, records last: after an interrupted removal they identify the rest.

    Raises:
        ConfigError: the folder is not a run's, or contains something that runs do not write.
    """
    entries = sorted(output.iterdir()) if output.is_dir() else []
    names = {path.name for path in entries}
    if foreign := [path.name for path in entries if not _is_written_by_runs(path)]:
        raise ConfigError(
            f"--overwrite_output_dir: {output} contains {foreign[0]}, which finetune.py does not write",
            "Move it away, or give another --output_dir",
        )
    if entries and not {*OWNERSHIP_RECORDS, STAGING} & names and not newest_checkpoint(output):
        raise ConfigError(
            f"--overwrite_output_dir: {output} is not the folder of a run, it has no {OWNERSHIP_RECORDS[0]}",
            "Give another --output_dir, or remove its files yourself",
        )
    return _records_last(entries)


def _records_last(entries: Iterable[Path]) -> list[Path]:
    return sorted(entries, key=lambda path: path.name in OWNERSHIP_RECORDS)


def _is_written_by_runs(path: Path) -> bool:
    if path.is_symlink():
        return False
    if not path.is_dir():
        return RUN_FILE.fullmatch(path.name) is not None
    if path.name in RUN_SUBFOLDERS:
        return all(file.is_dir() or RUN_SUBFOLDERS[path.name].match(file.name) for file in path.rglob("*"))
    is_checkpoint = any((path / name).is_file() for name in (TRAINER_STATE, MANIFEST))
    return (CHECKPOINT.fullmatch(path.name) is not None and is_checkpoint) or path.name == STAGING


def _check_outside_inputs(args: RunArguments) -> None:
    """Check that the output folder is neither inside nor around an input, and that no data would be removed."""
    output = args.output_dir.resolve()
    for flag, value in (
        ("--model_name_or_path", args.model.model_name_or_path),
        ("--lora_weight_path", args.lora.lora_weight_path),
    ):
        folder = Path(value).resolve() if value and os.path.isdir(value) else None
        if folder is None:
            continue
        if folder == output:
            what = "the model's own folder" if flag == "--model_name_or_path" else f"the folder of {flag}"
            raise ConfigError(f"--output_dir {args.output_dir} is {what}", "Give another folder")
        if _is_inside(output, folder):
            raise ConfigError(f"--output_dir {args.output_dir} is inside {flag} {value}", "Give a separate folder")
        if _is_inside(folder, output):
            raise ConfigError(f"--output_dir {args.output_dir} contains {flag} {value}", "Give a separate folder")
    for flag, names in (("--data_path", args.data.data_path), ("--eval_data_path", args.data.eval_data_path)):
        for name in names if args.overwrite_output_dir and names else ():
            try:
                path = parse_source(name, flag).path
            except ConfigError:
                continue  # reported with the other faults
            if _is_inside(path, output):
                raise ConfigError(
                    f"--overwrite_output_dir: {flag} {name} is inside --output_dir {args.output_dir}",
                    "Move the data away",
                )


def _is_inside(path: Path, folder: Path) -> bool:
    return folder.resolve() in path.resolve().parents


def _check_writable(output: Path) -> None:
    parent = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not parent.is_dir():
        raise ConfigError(f"--output_dir {output}: {parent} is a file", "Give a folder")
    try:
        if not os.access(parent, os.W_OK | os.X_OK):
            raise PermissionError(0, "permission denied")
        # Permissions are not enough: a disk can be mounted read-only, and root has every permission.
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise ConfigError(
            f"--output_dir {output}: {parent} is not writable ({(error.strerror or str(error)).lower()})",
            "Choose a writable folder",
        ) from error


def _alternatives(output: Path) -> str:
    alternatives = ["Give a new folder"]
    if newest := newest_checkpoint(output):
        alternatives.append(f"resume with --resume_from_checkpoint {newest}")
    try:
        find_removable(output)
        alternatives.append("start over with --overwrite_output_dir, which removes what that run wrote")
    except ConfigError:
        pass  # it contains more than a run's files
    return ", or ".join(alternatives)
