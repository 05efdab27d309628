"""What a run begins with: nothing, or a checkpoint; or that it has been done already.

``--resume_from_checkpoint`` names a checkpoint, or the newest whole one (``True``), or leaves it to the folder
(``auto``): go on where there is something to go on from, start where there is not. Only the first process looks at the
disk; the others are told. Imports no torch.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints.files import load_json_or_empty
from errors import ConfigError, numbered, shared
from processes import is_restart
from training.config.args import RunArguments
from training.run_folder.changes import Facts, check_changes, differing_run, facts_from_args
from training.run_folder.manifest import (
    MANIFEST,
    DamagedError,
    check_whole,
    checkpoints_in,
    load_manifest,
    newest_checkpoint,
    newest_whole_checkpoint,
    step_of,
)
from training.run_folder.names import RUN_ARGUMENTS, RUN_SUMMARY, TRAINER_STATE

if TYPE_CHECKING:
    from training.distributed.world import World

logger = logging.getLogger(__name__)

_ANEW = "Give another --output_dir, or start anew with --overwrite_output_dir"
# More of them goes on behind the end of a run that is done.
_LENGTHS = ("num_train_epochs", "max_steps")


@dataclass(frozen=True)
class Start:
    """What a run begins with.

    Attributes:
        checkpoint: the folder it goes on from.
        is_finished: whether the same run has been done, and nothing is left to do.
        removes_leftovers: whether to remove what this run left in the output folder before its first checkpoint.
    """

    checkpoint: str | None = None
    is_finished: bool = False
    removes_leftovers: bool = False


def starts_over(args: RunArguments) -> bool:
    """Return whether ``--overwrite_output_dir`` removes the files of an earlier run.

    With ``--resume_from_checkpoint auto`` only at the first start: processes that torchrun restarts after a failure
    resume from what they saved.
    """
    return args.overwrite_output_dir and not (args.resumes_automatically and is_restart())


def resumed_checkpoint(args: RunArguments) -> str | None:
    """Return the folder of ``--resume_from_checkpoint``, found by its name only: whether it is whole is not checked.

    Raises:
        ConfigError: there is no checkpoint, and ``auto`` was not given.
    """
    value = args.resume
    if value is None or (args.resumes_automatically and starts_over(args)):
        return None
    folder = newest_checkpoint(args.output_dir) if value in ("True", "auto") else Path(value).expanduser()
    if folder is not None and (folder / TRAINER_STATE).is_file():
        return str(folder)
    if args.resumes_automatically:
        return None
    raise ConfigError(
        f"--resume_from_checkpoint {args.trainer_value('resume_from_checkpoint')}: there is no checkpoint",
        "Give a checkpoint-* folder of the run",
    )


def check_start(args: RunArguments) -> None:
    """Compare the command line with the checkpoint that would be resumed, before anything is loaded.

    Raises:
        ConfigError: what differs and cannot; a checkpoint of a newer version.
    """
    resumed = resumed_checkpoint(args)
    if resumed is None or (args.resumes_automatically and (args.output_dir / RUN_SUMMARY).exists()):
        return
    with contextlib.suppress(DamagedError):  # which one is taken then is found out later
        check_changes(facts_from_args(args), load_manifest(Path(resumed)), resumed, args.allow_resume_changes)


def agree_on_start(world: World, args: RunArguments, facts: Facts) -> Start:
    """What the run begins with, the same on all processes.

    Args:
        facts: what the run is known by, its data included; see :mod:`training.run_folder.changes`.

    Raises:
        ConfigError: the checkpoint is damaged or of another run; the folder is another run's.
    """
    said: dict[str, Any] = {}
    if world.is_first:
        try:
            said = asdict(find_start(args, facts))
        except ConfigError as error:
            said = {"refused": str(error)}
    said = world.broadcast_from_rank0("start", said)
    if "refused" in said:
        raise shared(ConfigError(said["refused"]))
    start = Start(**said)
    if start.is_finished:
        logger.info("%s contains this run, finished: nothing to do", args.output_dir)
    if start.checkpoint is not None and not Path(start.checkpoint).is_dir():
        raise ConfigError(
            f"--output_dir: {world.describe(world.rank)} does not see {start.checkpoint}",
            "All hosts need the same folder, on storage that they share",
        )
    return start


def find_start(args: RunArguments, facts: Facts) -> Start:
    """What the run begins with, by what lies on the disk.

    Raises:
        ConfigError: see :func:`agree_on_start`.
    """
    value = args.resume
    if value is None or (args.resumes_automatically and starts_over(args)):
        return Start()
    if args.resumes_automatically:
        return _find_auto(args, facts)
    if value == "True":
        found = newest_whole_checkpoint(args.output_dir)
        if found is None:
            raise ConfigError(
                f"--resume_from_checkpoint True: there is no whole checkpoint in {args.output_dir}", _by_name(args)
            )
        return _go_on(args, facts, *found)
    named = Path(resumed_checkpoint(args) or value)
    return _go_on(args, facts, named, _check_named(named))


def _find_auto(args: RunArguments, facts: Facts) -> Start:
    output = args.output_dir
    recorded = {"arguments": load_json_or_empty(output / RUN_ARGUMENTS)}
    differing = differing_run(facts, recorded)
    if summary := load_json_or_empty(output / RUN_SUMMARY):
        differing += _other_inputs(facts, summary)
        if not differing and recorded["arguments"]:
            return Start(is_finished=True)
        if not _is_longer(facts["arguments"], recorded["arguments"]):
            raise _another_run(f"holds a run that is done ({summary.get('steps')} steps), and not this one", differing)
    if found := newest_whole_checkpoint(output):
        return _go_on(args, facts, *found)
    unknown = [path.name for path in checkpoints_in(output) if not (path / MANIFEST).exists()]
    if unknown:
        raise ConfigError(
            f"--resume_from_checkpoint auto: {output / unknown[0]} has no {MANIFEST}, so nothing tells whether it is "
            "whole and of this run",
            _by_name(args),
        )
    if all(path.name.startswith(".") for path in (output.iterdir() if output.is_dir() else ())):
        return Start(removes_leftovers=True)  # at most what a process was writing when it was killed
    if differing or not recorded["arguments"]:
        raise _another_run("holds another run", differing)
    logger.info("%s holds what this run left before its first checkpoint; it starts anew", output)
    return Start(removes_leftovers=True)


def _go_on(args: RunArguments, facts: Facts, checkpoint: Path, saved: Facts) -> Start:
    accepted = check_changes(facts, saved, checkpoint, args.allow_resume_changes) if saved else []
    if accepted:
        logger.warning("%s", numbered(f"The run changes at {checkpoint}", accepted))
    if args.trainer_value("ignore_data_skip"):
        logger.warning("--ignore_data_skip: the epoch begins again with its first examples, which trained already")
    if later := [path.name for path in checkpoints_in(checkpoint.parent) if step_of(path) > step_of(checkpoint)]:
        logger.warning(
            "Going on from %s: the steps behind it happen again, and %s will be removed with the first checkpoint that "
            "is saved", checkpoint, ", ".join(reversed(later)),
        )  # fmt: skip
    else:
        logger.info("Going on from %s", checkpoint)
    return Start(checkpoint=str(checkpoint))


def _check_named(checkpoint: Path) -> Facts:
    """The manifest of a checkpoint that was asked for by its name; empty where it has none."""
    if not (checkpoint / MANIFEST).exists():
        logger.warning(
            "%s has no %s: nothing tells whether it is whole, and of this model and data", checkpoint, MANIFEST
        )
        return {}
    try:
        manifest = load_manifest(checkpoint)
        check_whole(checkpoint, manifest)
    except DamagedError as error:
        raise ConfigError(
            f"--resume_from_checkpoint {checkpoint}: it is not whole, {error}",
            "Give an earlier one; --resume_from_checkpoint auto finds the newest that is whole",
        ) from error
    return manifest


def _other_inputs(facts: Facts, summary: Mapping[str, Any]) -> list[str]:
    """Where the names are the same and what lies there is not."""
    lines = []
    if summary.get("base_fingerprint") != facts["base"]:
        lines.append("weights of the base model: others than those of that run")
    for name, digest in facts["data"].items():
        if summary.get("data", {}).get(name, {}).get("digest") != digest:
            lines.append(f"data to {name}: other examples than those of that run")
    return lines


def _is_longer(new: Mapping[str, Any], old: Mapping[str, Any]) -> bool:
    return any(new[name] > old.get(name, new[name]) for name in _LENGTHS)


def _another_run(what: str, differing: list[str]) -> ConfigError:
    return ConfigError(
        numbered(f"--resume_from_checkpoint auto: --output_dir {what}", differing or [f"it has no {RUN_ARGUMENTS}"])
        + f"\n  {_ANEW}"
    )


def _by_name(args: RunArguments) -> str:
    if unknown := [path for path in checkpoints_in(args.output_dir) if not (path / MANIFEST).exists()]:
        return f"Name it to use it all the same: --resume_from_checkpoint {unknown[0]}"
    return _ANEW
