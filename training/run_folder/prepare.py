"""Checks before a run writes to its output folder, and the removal of what an earlier run left there."""

from __future__ import annotations

import logging
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from checkpoints.names import RUN_ARGUMENTS, RUN_SUMMARY
from data_utils.sources import parse_source
from errors import ConfigError
from loading.config_files import find_local_folder
from outputs import check_name, check_output_file, check_shared_folder, kind_of
from ownership import MARK, OwnedFolder, check_not_in_use, check_temporary_folder, has_mark
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
    TEMPORARY,
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
    _check_place(args)
    check_not_in_use(output, f"--output_dir {output}")
    resumed = resumed_checkpoint(args)
    if starts_over(args):
        if resumed is not None and _is_inside(Path(resumed), output):
            raise ConfigError(
                f"--overwrite_output_dir would remove the checkpoint of --resume_from_checkpoint {resumed}",
                "Leave one of them out",
            )
        find_removable(output)
    elif (entries := entries_of(output)) and (resumed is None or not _is_inside(Path(resumed), output)):
        if args.resumes_automatically and (
            (output / RUN_ARGUMENTS).is_file() or all(path.name.startswith(".") for path in entries)
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
        entries = _records_last(path for path in entries_of(output) if _is_written_by_runs(path))
    for path in entries:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def owned_output(args: RunArguments) -> Iterator[None]:
    """Own the output folder during the block, so that no other run writes to it.

    Rank 0 makes and locks it, for all ranks: the others may be on hosts whose locks it does not see. Folders that are
    still empty at the end are removed again.

    Raises:
        ConfigError: another run uses the folder; the message names its process.
    """
    if not is_first():
        yield
        return
    output = args.output_dir
    new = [folder for folder in (output, *output.absolute().parents) if not folder.exists()]
    try:
        output.mkdir(parents=True, exist_ok=True)
        owned = OwnedFolder(output, f"--output_dir {output}")
    except OSError as error:
        what = f"--output_dir {output} cannot be created ({error.strerror})"
        raise ConfigError(what, "Choose a writable folder") from error
    try:
        yield
    finally:
        owned.release()
        with suppress(OSError):  # not empty
            for folder in new:
                folder.rmdir()


def entries_of(output: Path) -> list[Path]:
    """Return what is in an output folder, without the mark of the process that uses it; sorted."""
    return sorted(path for path in output.iterdir() if path.name != MARK) if output.is_dir() else []


def find_removable(output: Path) -> list[Path]:
    """Return what an earlier run left in a folder, records last: after an interrupted removal they identify the rest.

    Raises:
        ConfigError: the folder is not a run's, or contains something that runs do not write.
    """
    entries = entries_of(output)
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
        return path.is_file() and RUN_FILE.fullmatch(path.name) is not None
    if path.name in RUN_SUBFOLDERS:
        return all(file.is_dir() or RUN_SUBFOLDERS[path.name].match(file.name) for file in path.rglob("*"))
    is_checkpoint = any((path / name).is_file() for name in (TRAINER_STATE, MANIFEST))
    is_temporary = path.name == STAGING or TEMPORARY.fullmatch(path.name) is not None
    return (CHECKPOINT.fullmatch(path.name) is not None and is_checkpoint) or (is_temporary and has_mark(path))


def _check_outside_inputs(args: RunArguments) -> None:
    """Check that the output folder is neither inside nor around an input, and that no data would be removed."""
    output = args.output_dir
    for flag, folder in _input_folders(args).items():
        if os.path.realpath(folder) == os.path.realpath(output):
            what = "the model's own folder" if flag == "--model_name_or_path" else f"the folder of {flag}"
            raise ConfigError(f"--output_dir {args.output_dir} is {what}", "Give another folder")
        if _is_inside(output, folder):
            raise ConfigError(f"--output_dir {args.output_dir} is inside {flag} {folder}", "Give a separate folder")
        if _is_inside(folder, output):
            raise ConfigError(f"--output_dir {args.output_dir} contains {flag} {folder}", "Give a separate folder")
    for flag, names in (("--data_path", args.data.data_path), ("--eval_data_path", args.data.eval_data_path)):
        for name in names or ():
            try:
                path = parse_source(name, flag).path
            except ConfigError:
                continue  # reported with the other faults
            if _is_inside(path, output) and (args.overwrite_output_dir or RUN_FILE.fullmatch(path.name)):
                prefix = "--overwrite_output_dir: " if args.overwrite_output_dir else ""
                what = f"{prefix}{flag} {name} is inside --output_dir {args.output_dir}"
                raise ConfigError(what, "Move the data away")


def check_report_files(args: RunArguments, words: Iterable[str], outputs: Mapping[str, Path | None]) -> None:
    """Check the files that a preview writes: none of them is an input, or another one of them.

    Args:
        words: the command line; every file that it names is an input.
        outputs: the files by their flags; ``None`` for those that were not asked for.

    Raises:
        ConfigError: see :func:`outputs.check_output_file`.
    """
    inputs = {flag: [folder] for flag, folder in _input_folders(args).items()}
    data = [*(args.data.data_path or ()), *(args.data.eval_data_path or ())]
    inputs["--data_path"] = [_path_of(name) for name in data]
    inputs["another flag"] = [Path(word) for word in words if os.path.isfile(word)]
    for flag, path in outputs.items():
        if path is not None:
            check_output_file(path, flag, inputs)
            inputs[flag] = [path]


def _path_of(name: str) -> Path:
    try:
        return parse_source(name).path
    except ConfigError:
        return Path(name)


def _input_folders(args: RunArguments) -> dict[str, Path]:
    """Return the folders that the run reads weights from, by flag; hub ids by their folder in the local cache."""
    model, lora = args.model, args.lora
    folders = {"--model_name_or_path": find_local_folder(model.model_name_or_path, model.cache_dir, model.model_hub)}
    if lora.lora_weight_path:
        folders["--lora_weight_path"] = Path(lora.lora_weight_path)
    return {flag: folder for flag, folder in folders.items() if os.path.isdir(folder)}


def _is_inside(path: Path, folder: Path) -> bool:
    return Path(os.path.realpath(folder)) in Path(os.path.realpath(path)).parents


def _check_place(args: RunArguments) -> None:
    """Check that the output folder, and each file that the run would write into it, is one or can become one."""
    output = args.output_dir
    if (named := args.trainer_value("output_dir")) is not None:
        check_name(named, "--output_dir")  # Path("") would be the working folder
    _check_outside_inputs(args)
    check_shared_folder(output, "--output_dir")
    check_temporary_folder(output / STAGING)
    for path in entries_of(output):
        is_subfolder, status = path.name in RUN_SUBFOLDERS, path.lstat()
        if not (stat.S_ISDIR if is_subfolder else stat.S_ISREG)(status.st_mode) and (
            is_subfolder or RUN_FILE.fullmatch(path.name)
        ):
            raise ConfigError(f"--output_dir {output}: {path.name} is {kind_of(status)}", "Move it away")
    if args.options.logging_dir:
        inputs = {flag: [folder] for flag, folder in _input_folders(args).items()}
        check_shared_folder(Path(args.options.logging_dir).expanduser(), "--logging_dir", inputs)


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
