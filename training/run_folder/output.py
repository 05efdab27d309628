"""The output folder: whether a run may write there, what it replaces, and saving that is never half-done."""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data_utils.sources import parse_source
from errors import ConfigError, RunError, Terminated
from processes import is_first
from training.config.args import RunArguments
from training.run_folder.manifest import CHECKPOINT, MANIFEST, newest_checkpoint
from training.run_folder.names import RECORDS, RUN_ARGUMENTS, RUN_SUMMARY, TRAINER_STATE
from training.run_folder.staging import STAGING
from training.run_folder.start import resumed_checkpoint, starts_over

logger = logging.getLogger(__name__)

_OUR_FILES = re.compile(
    r"training_log\.jsonl|training_loss\.png|run_summary\.json|run_args\.(json|yaml)|data_receipt\.(json|html)"
    r"|config\.json|generation_config\.json|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    r"|adapter_config\.json|adapter_model\.safetensors|base_quantization\.json"
    r"|qwen(_extra)?\.tiktoken|tokenizer(_config)?\.json|vocab\.json|merges\.txt|special_tokens_map\.json"
    r"|added_tokens\.json|chat_template\.(jinja|json)"
    r"|\..*\.partial"  # left by a process that was killed
)
# Of folders, every file in them must match.
_OUR_FOLDERS = {
    "runs": re.compile(r"events\.out\.tfevents"),  # TensorBoard's
    "profile": re.compile(r"(trace\.json(\.gz)?|operators\.txt)$"),
}


# ------------------------------------------------------------------------------------------------------ before a run


def check_output(args: RunArguments) -> None:
    """Check that a run may write to its output folder; nothing is changed.

    Only the first process looks: the others might see it remove and write already.

    Raises:
        ConfigError: the folder is a file, cannot be written, has to do with the model's own, or holds what the run
            would mix with: it must be empty, or the folder of the checkpoint that is resumed, or a run's that
            ``--overwrite_output_dir`` gives up or ``--resume_from_checkpoint auto`` looks into.
    """
    if not is_first():
        return
    output = args.output_dir
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output_dir {output} is a file", "Give a folder")
    _check_apart(args)
    _check_writable(output)
    resumed = resumed_checkpoint(args)
    if starts_over(args):
        if resumed is not None and _within(Path(resumed), output):
            raise ConfigError(
                f"--overwrite_output_dir would remove the checkpoint of --resume_from_checkpoint {resumed}",
                "Leave one of them out",
            )
        removable(output)
    elif output.is_dir() and any(output.iterdir()) and (resumed is None or not _within(Path(resumed), output)):
        if args.resumes_automatically and (
            (output / RUN_ARGUMENTS).is_file() or all(path.name.startswith(".") for path in output.iterdir())
        ):
            return  # what it holds is looked at when the data is known: see training.run_folder.start
        raise ConfigError(f"--output_dir {output} is not empty", _ways_on(output))


def prepare_output(args: RunArguments, removes_leftovers: bool = False) -> None:
    """Check the output folder, then remove what the run does not go on with.

    That is all of an earlier run with ``--overwrite_output_dir``, and else the summary of one that had ended.

    Args:
        removes_leftovers: whether what this run left when it died before its first checkpoint is removed, too.

    Raises:
        ConfigError: see :func:`check_output`; nothing has been removed then.
    """
    check_output(args)
    output = args.output_dir
    if not is_first() or not output.is_dir():
        return
    entries = [output / RUN_SUMMARY] if (output / RUN_SUMMARY).is_file() else []
    if starts_over(args):
        entries = removable(output)
        if entries:
            logger.info("--overwrite_output_dir: removing %d files and folders of an earlier run", len(entries))
    elif removes_leftovers:
        entries = _records_last(path for path in output.iterdir() if _is_ours(path))
    for path in entries:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def removable(output: Path) -> list[Path]:
    """What an earlier run left in a folder, its records last, so that the rest of a broken removal is known again.

    Raises:
        ConfigError: the folder is no run's, or holds something that no run writes.
    """
    entries = sorted(output.iterdir()) if output.is_dir() else []
    names = [path.name for path in entries]
    if foreign := [path.name for path in entries if not _is_ours(path)]:
        raise ConfigError(
            f"--overwrite_output_dir: {output} holds {foreign[0]}, which no run of finetune.py wrote",
            "Move it away, or give another --output_dir",
        )
    if entries and not {*RECORDS, STAGING} & set(names) and not newest_checkpoint(output):
        raise ConfigError(
            f"--overwrite_output_dir: {output} is not the folder of a run, it has no {RECORDS[0]}",
            "Give another --output_dir, or remove its files yourself",
        )
    return _records_last(entries)


def _records_last(entries: Iterable[Path]) -> list[Path]:
    return sorted(entries, key=lambda path: path.name in RECORDS)


def _is_ours(path: Path) -> bool:
    if path.is_symlink():
        return False
    if not path.is_dir():
        return _OUR_FILES.fullmatch(path.name) is not None
    if path.name in _OUR_FOLDERS:
        return all(file.is_dir() or _OUR_FOLDERS[path.name].match(file.name) for file in path.rglob("*"))
    is_checkpoint = any((path / name).is_file() for name in (TRAINER_STATE, MANIFEST))
    return (CHECKPOINT.fullmatch(path.name) is not None and is_checkpoint) or path.name == STAGING


def _check_apart(args: RunArguments) -> None:
    """A run must not write among its own inputs."""
    output = args.output_dir.resolve()
    for flag, value in (
        ("--model_name_or_path", args.model.model_name_or_path),
        ("--lora_weight_path", args.lora.lora_weight_path),
    ):
        folder = Path(value).resolve() if value and Path(value).is_dir() else None
        if folder is None:
            continue
        if folder == output:
            what = "the model's own folder" if flag == "--model_name_or_path" else f"the folder of {flag}"
            raise ConfigError(f"--output_dir {args.output_dir} is {what}", "Give another folder")
        if _within(output, folder) or _within(folder, output):
            side = "inside of" if _within(output, folder) else "around"
            raise ConfigError(
                f"--output_dir {args.output_dir} lies {side} {flag} {value}", "Give a folder that stands apart"
            )
    for flag, names in (("--data_path", args.data.data_path), ("--eval_data_path", args.data.eval_data_path)):
        for name in names if args.overwrite_output_dir and names else ():
            try:
                path = parse_source(name, flag).path
            except ConfigError:
                continue  # said with the other faults
            if _within(path, output):
                raise ConfigError(
                    f"--overwrite_output_dir: {flag} {name} lies in --output_dir {args.output_dir}",
                    "Move the data away",
                )


def _within(path: Path, folder: Path) -> bool:
    return folder.resolve() in path.resolve().parents


def _check_writable(output: Path) -> None:
    parent = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not parent.is_dir():
        raise ConfigError(f"--output_dir {output}: {parent} is a file", "Give a folder")
    try:
        if not os.access(parent, os.W_OK | os.X_OK):
            raise PermissionError(0, "permission denied")
        # What the permissions say is not all: a disk can be mounted read-only, and root may do everything.
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise ConfigError(
            f"--output_dir {output}: {parent} is not writable ({(error.strerror or str(error)).lower()})",
            "Choose a folder you may write to",
        ) from error


def _ways_on(output: Path) -> str:
    ways = ["Give a new folder"]
    if newest := newest_checkpoint(output):
        ways.append(f"go on with --resume_from_checkpoint {newest}")
    try:
        removable(output)
        ways.append("start anew with --overwrite_output_dir, which removes what that run left")
    except ConfigError:
        pass  # there is more than a run's files
    return ", or ".join(ways)


# ------------------------------------------------------------------------------------------------- after interruptions


@contextmanager
def explain_how_to_resume(output: Path, resumes_automatically: bool = False) -> Iterator[None]:
    """Say with an interruption or a failure of the block how the run goes on.

    Args:
        resumes_automatically: whether ``--resume_from_checkpoint auto`` was given.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(_how_to_go_on(output, resumes_automatically)) from error
    except Terminated as error:
        raise Terminated(_how_to_go_on(output, resumes_automatically)) from error
    except RunError as error:
        raise RunError(str(error), _how_to_go_on(output, resumes_automatically)) from error


def _how_to_go_on(output: Path, resumes_automatically: bool) -> str:
    newest = newest_checkpoint(output)
    if resumes_automatically:
        return f"The same command goes on from {newest}" if newest else "The same command starts anew"
    if newest is not None:
        return f"The same command with --resume_from_checkpoint {newest} goes on from there"
    return "No checkpoint had been saved: the same command with --overwrite_output_dir starts anew"


# -------------------------------------------------------------------------------------------------------------- saving
