"""The start of a run: from the base model, or from a checkpoint; or none, because the run has finished already.

``--resume_from_checkpoint`` names a checkpoint, asks for the newest intact one (``True``), or decides by the output
folder (``auto``): resume if there is a checkpoint, start otherwise. Rank 0 reads the disk and broadcasts the decision.
Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints.files import is_file, load_json
from checkpoints.input_folders import check_files
from checkpoints.names import RUN_ARGUMENTS, RUN_SUMMARY
from errors import ConfigError, numbered, shared
from processes import is_restart
from training.config.args import RunArguments
from training.run_folder.changes import RunFacts, check_changes, facts_from_args, find_differing_arguments
from training.run_folder.manifest import (
    DamagedError,
    Manifest,
    check_intact,
    checkpoints_in,
    load_manifest,
    newest_checkpoint,
    newest_intact_checkpoint,
    step_of,
)
from training.run_folder.names import MANIFEST, TRAINER_STATE
from training.run_folder.resumed import find_best, find_unnamed, load_state

if TYPE_CHECKING:
    from training.distributed.world import World

logger = logging.getLogger(__name__)

_OTHER_FOLDER = "Give another --output_dir, or start over with --overwrite_output_dir"
# A larger value continues a run that has finished.
_LENGTHS = ("num_train_epochs", "max_steps")


@dataclass(frozen=True)
class Start:
    """The start of a run.

    Attributes:
        checkpoint: the folder that it resumes from.
        is_finished: the same run has finished already; nothing is left to do.
        removes_leftovers: remove what this run wrote to the output folder before it died without a checkpoint.
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
    """Return the folder of ``--resume_from_checkpoint``, found by its name only: whether it is intact is not checked.

    Raises:
        ConfigError: there is no checkpoint, and ``auto`` was not given.
    """
    value = args.resume
    if value is None or (args.resumes_automatically and starts_over(args)):
        return None
    folder = newest_checkpoint(args.output_dir) if value in ("True", "auto") else Path(os.path.expanduser(value))
    if folder is not None and is_file(folder / TRAINER_STATE):
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
        ConfigError: a difference is not accepted, or a newer version wrote the checkpoint.
    """
    resumed = resumed_checkpoint(args)
    if resumed is None or (args.resumes_automatically and (args.output_dir / RUN_SUMMARY).exists()):
        return
    with contextlib.suppress(DamagedError):  # find_start selects another one
        check_changes(facts_from_args(args), load_manifest(Path(resumed)), resumed, args.allow_resume_changes)


def agree_on_start(world: World, args: RunArguments, facts: RunFacts) -> Start:
    """Return how the run starts, the same on all ranks.

    Args:
        facts: all facts of the run, see :mod:`training.run_folder.changes`; only those of rank 0 are read.

    Raises:
        ConfigError: the checkpoint is damaged or belongs to another run, or the folder contains another run.
    """
    decision: dict[str, Any] = {}
    if world.is_first:
        try:
            decision = asdict(find_start(args, facts))
        except ConfigError as error:
            decision = {"refused": str(error)}
    decision = world.broadcast_from_rank0("start", decision)
    if "refused" in decision:
        raise shared(ConfigError(decision["refused"]))
    start = Start(**decision)
    if start.is_finished:
        logger.info("%s contains this run, finished: nothing to do", args.output_dir)
    if start.checkpoint is not None and not Path(start.checkpoint).is_dir():
        raise ConfigError(
            f"--output_dir: {world.describe(world.rank)} does not see {start.checkpoint}",
            "All hosts need the same folder, on shared storage",
        )
    return start


def find_start(args: RunArguments, facts: RunFacts) -> Start:
    """Return how the run starts, from the files on disk.

    Raises:
        ConfigError: see :func:`agree_on_start`.
    """
    value = args.resume
    if value is None or (args.resumes_automatically and starts_over(args)):
        return Start()
    if args.resumes_automatically:
        return _find_automatically(args, facts)
    if value == "True":
        newest = newest_intact_checkpoint(args.output_dir)
        if newest is None:
            raise ConfigError(
                f"--resume_from_checkpoint True: there is no intact checkpoint in {args.output_dir}",
                _how_to_use_without_manifest(args),
            )
        return _resume(args, facts, *newest)
    named = Path(resumed_checkpoint(args) or value)
    return _resume(args, facts, named, _load_named_manifest(named))


def _find_automatically(args: RunArguments, facts: RunFacts) -> Start:
    output = args.output_dir
    recorded = {"arguments": _load_record(output / RUN_ARGUMENTS)}
    summary = _load_record(output / RUN_SUMMARY)
    differing = find_differing_arguments(facts, recorded, compares_paths=not summary)
    if summary:
        differing += _differing_inputs(facts, summary)
        if not differing and recorded["arguments"]:
            return Start(is_finished=True)
        if not _is_longer(facts["arguments"], recorded["arguments"]):
            raise _another_run(f"contains another run, which has finished ({summary.get('steps')} steps)", differing)
    if newest := newest_intact_checkpoint(output):
        return _resume(args, facts, *newest)
    unverified = [path for path in checkpoints_in(output) if not (path / MANIFEST).exists()]
    if unverified:
        raise ConfigError(
            f"--resume_from_checkpoint auto: {unverified[0]} has no {MANIFEST} to check that it is intact and belongs "
            "to this run",
            _how_to_use_without_manifest(args),
        )
    if all(path.name.startswith(".") for path in (output.iterdir() if output.is_dir() else ())):
        return Start(removes_leftovers=True)  # at most what a process was writing when it was killed
    if differing or not recorded["arguments"]:
        raise _another_run("contains another run", differing)
    logger.info("%s contains what this run wrote before its first checkpoint; starting over", output)
    return Start(removes_leftovers=True)


def _load_record(path: Path) -> dict[str, Any]:
    """Read a record of the run that a folder contains; empty if there is none."""
    return load_json(path) if is_file(path) else {}


def _resume(args: RunArguments, facts: RunFacts, checkpoint: Path, saved: Manifest) -> Start:
    check_files(checkpoint)
    accepted = check_changes(facts, saved, checkpoint, args.allow_resume_changes) if saved else []
    state = load_state(checkpoint)
    step = saved["step"] if saved else state.get("global_step", 0)
    if state.get("global_step", step) != step:
        what = f"{checkpoint / TRAINER_STATE}: global_step is {state['global_step']}, {MANIFEST} says {step}"
        raise ConfigError(what, "Give an earlier checkpoint")
    _check_best(args, facts, checkpoint, state)
    if unnamed := find_unnamed(checkpoint, saved) if saved else []:
        logger.warning("%s: not named by its %s and not read: %s", checkpoint, MANIFEST, ", ".join(unnamed[:5]))
    if accepted:
        logger.warning("%s", numbered(f"Settings that change at {checkpoint}", accepted))
    if facts["arguments"]["ignore_data_skip"]:
        logger.warning("--ignore_data_skip: the epoch starts again with examples that it has trained already")
    if later := [path.name for path in checkpoints_in(args.output_dir) if step_of(path) > step]:
        logger.warning(
            "Resuming from %s: later steps are repeated, and %s will be removed when the next checkpoint is saved",
            checkpoint, ", ".join(reversed(later)),
        )  # fmt: skip
    else:
        logger.info("Resuming from %s", checkpoint)
    return Start(checkpoint=str(checkpoint))


def _check_best(args: RunArguments, facts: RunFacts, checkpoint: Path, state: Mapping[str, Any]) -> None:
    """Check that the best checkpoint so far, whose weights may become the result, is there and of the same run.

    Args:
        state: the trainer's state in ``checkpoint``.

    Raises:
        ConfigError: it is not.
    """
    best = find_best(checkpoint, state)
    if best is None or best == checkpoint or not args.trainer_value("load_best_model_at_end"):
        return
    what = f"--load_best_model_at_end: the best checkpoint before {checkpoint} is {best}, which"
    fix = "Copy it there from where it is, or resume without --load_best_model_at_end"
    if not best.is_dir():
        raise ConfigError(f"{what} does not exist", fix)
    manifest = _load_named_manifest(best)
    if manifest:
        check_changes(facts, manifest, best, allowed=True)
    # The logs of a run's checkpoints begin with the same lines; as text, because NaN differs from NaN.
    first, log = (each.get("log_history") or [] for each in (load_state(best), state))
    if json.dumps(log[: len(first)]) != json.dumps(first):
        raise ConfigError(f"{what} is of another run", fix)


def _load_named_manifest(checkpoint: Path) -> Manifest:
    """Return the manifest of a checkpoint that the user named; empty if it has none."""
    if not (checkpoint / MANIFEST).exists():
        logger.warning(
            "%s has no %s to check that it is intact and fits this model and data", checkpoint, MANIFEST
        )  # fmt: skip
        return {}
    try:
        manifest = load_manifest(checkpoint)
        check_intact(checkpoint, manifest)
    except DamagedError as error:
        raise ConfigError(
            f"--resume_from_checkpoint {checkpoint}: incomplete or damaged, {error}",
            "Give an earlier one; --resume_from_checkpoint auto finds the newest intact one",
        ) from error
    return manifest


def _differing_inputs(facts: RunFacts, summary: Mapping[str, Any]) -> list[str]:
    """Return a line for each input whose content changed under the same name."""
    lines = []
    if summary.get("base_fingerprint") != facts["base"]:
        lines.append("base model: its weights differ from those of that run")
    for name, title in (("train", "training data"), ("eval", "evaluation data")):
        if name in facts["data"] and summary.get("data", {}).get(name, {}).get("digest") != facts["data"][name]:
            lines.append(f"{title}: the examples differ")
    return lines


def _is_longer(new: Mapping[str, Any], old: Mapping[str, Any]) -> bool:
    return any(new[name] > old.get(name, new[name]) for name in _LENGTHS)


def _another_run(what: str, differing: list[str]) -> ConfigError:
    title = f"--resume_from_checkpoint auto: --output_dir {what}"
    return ConfigError(numbered(title, differing or [f"it has no {RUN_ARGUMENTS}"]) + f"\n  {_OTHER_FOLDER}")


def _how_to_use_without_manifest(args: RunArguments) -> str:
    if unverified := [path for path in checkpoints_in(args.output_dir) if not (path / MANIFEST).exists()]:
        return f"To use it unchecked, name it: --resume_from_checkpoint {unverified[0]}"
    return _OTHER_FOLDER
