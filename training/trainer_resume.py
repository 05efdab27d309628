"""Corrections to how transformers' Trainer resumes, so that a resumed run ends like an uninterrupted one."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from training.run_folder.manifest import checkpoints_in, step_of

_MOMENTS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "z"}


class EpochEnds(TrainerCallback, ExportableState):
    """Saves in checkpoints after which step an epoch last ended: a run can die between its last step and its end.

    Attributes:
        last_step: the step; ``None`` if a checkpoint of an earlier version does not contain it.
        grad_norm, learning_rate: of the latest step; the log line at the end of an epoch repeats them.
    """

    last_step: int | None = 0
    grad_norm: float | None = None
    learning_rate: float | None = None

    def state(self) -> dict[str, Any]:
        values = {"last": self.last_step, "grad_norm": self.grad_norm, "learning_rate": self.learning_rate}
        return {"args": {}, "attributes": values}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        callback_states: Any = state.stateful_callbacks
        saved = callback_states[type(self).__name__]["attributes"]
        self.last_step = saved.get("last")
        self.grad_norm, self.learning_rate = saved.get("grad_norm"), saved.get("learning_rate")

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.last_step = state.global_step

    def is_missing(self, step: int) -> bool:
        """Return whether the checkpoint of the last step of an epoch was saved before that epoch ended."""
        return self.last_step not in (None, step)


def add_missing_states(state: TrainerState, callbacks: Sequence[TrainerCallback]) -> None:
    """Give callbacks that a checkpoint does not know an empty state, which transformers expects; check the others.

    Raises:
        ValueError: a state has other types than the callback saves.
    """
    callback_states: Any = state.stateful_callbacks  # a dict once it has been loaded
    for callback in callbacks:
        if isinstance(callback, ExportableState):
            name = type(callback).__name__
            saved = callback_states.setdefault(name, {"args": {}, "attributes": {}})["attributes"]
            own = callback.state()["attributes"]
            for key in saved.keys() & own.keys():
                _check_state(saved[key], own[key], f"stateful_callbacks.{name}.{key}")


def _check_state(saved: Any, own: Any, place: str) -> None:
    if isinstance(own, dict) and (not isinstance(saved, dict) or saved.keys() != own.keys()):
        raise ValueError(f"{place} has other keys than {', '.join(own)}")
    if saved is not None:  # numbers that are not known yet are None
        check_types(saved, 0 if own is None else own, place)


def settings_of(optimizer: Any, scheduler: Any) -> dict[str, Any]:
    """Return a copy of what a checkpoint restores of an optimizer's settings and of the schedule."""
    groups = [{name: group[name] for name in group if name != "params"} for group in optimizer.param_groups]
    return copy.deepcopy({"param_groups": groups, "schedule": scheduler.state_dict()})


def check_types(restored: Any, before: Any, place: str = "") -> None:
    """Check that restored settings have the types of those before; a step would fail with any other.

    Raises:
        ValueError: they have not.
    """
    if isinstance(before, (bool, int, float)):
        fits = isinstance(restored, (bool, int, float))
    elif isinstance(before, (list, tuple)):
        fits = isinstance(restored, (list, tuple)) and len(restored) == len(before)
    else:
        fits = not isinstance(before, (str, Tensor, dict)) or isinstance(restored, type(before))
    if not fits:
        raise ValueError(f"{place} is {restored!r:.60}, not like {before!r:.60}")
    if isinstance(before, dict):
        for name in before:
            check_types(restored[name], before[name], f"{place}.{name}".lstrip("."))
    elif isinstance(before, (list, tuple)):
        for index, (each, each_before) in enumerate(zip(restored, before, strict=True)):
            check_types(each, each_before, f"{place}[{index}]")


def check_moments(optimizer: Any, args: TrainingArguments) -> None:
    """Check that restored moments have the shapes of their parameters; torch would only find out in the next step.

    Raises:
        ValueError: they have not.
    """
    if "galore" in args.optim or "apollo" in args.optim:  # they keep moments of projected gradients
        return
    for parameter, state in optimizer.state.items():
        for name in _MOMENTS & state.keys():
            if state[name].shape != parameter.shape:
                shapes = f"{tuple(state[name].shape)}, its parameter {tuple(parameter.shape)}"
                raise ValueError(f"a moment {name} has the shape {shapes}")


def import_projectors(args: TrainingArguments) -> None:
    """Import the package of GaLore or APOLLO, whose class a checkpoint names; others are refused there."""
    name = str(getattr(args.optim, "value", args.optim))
    if name.startswith("galore_"):
        importlib.import_module("galore_torch")
    elif name.startswith("apollo_"):
        importlib.import_module("apollo_torch")


def move_projectors(optimizer: Any) -> None:
    """Move what GaLore and APOLLO keep per parameter to its device; torch only moves the tensors that it finds."""
    for parameter, state in optimizer.state.items():
        kept = vars(state["projector"]) if "projector" in state else {}
        for name, value in kept.items():
            if isinstance(value, Tensor):
                kept[name] = value.to(parameter.device)
            elif isinstance(value, list):
                kept[name] = [each.to(parameter.device) if isinstance(each, Tensor) else each for each in value]


def set_learning_rate(scheduler: Any, rates: Sequence[float]) -> None:
    """Scale a loaded schedule to the learning rates of the command; transformers silently keeps the checkpoint's.

    Args:
        rates: of each group, before the schedule changed them.
    """
    base_rates = getattr(scheduler, "base_lrs", [])
    if base_rates == rates:
        return
    groups = scheduler.optimizer.param_groups
    for group, base_rate, rate in zip(groups, base_rates, rates, strict=True):
        factor = group["lr"] / base_rate if base_rate else 0.0
        group["initial_lr"], group["lr"] = rate, rate * factor
    scheduler.base_lrs = list(rates)
    scheduler._last_lr = [group["lr"] for group in groups]  # the log reads it


def superseded_by(saved: Path, limit: int | None, best: str | None) -> list[Path]:
    """Return the checkpoints that a newly saved one supersedes.

    Those of later steps belong to steps that are trained again, and would be taken for the newest. Of the earlier ones
    the oldest beyond ``--save_total_limit`` are superfluous, but never the best.

    Args:
        saved: the new checkpoint, complete.
        limit: ``--save_total_limit``.
        best: the folder of the best checkpoint so far.
    """
    checkpoints = [path for path in checkpoints_in(saved.parent) if not path.is_symlink()]
    earlier = [path for path in checkpoints if step_of(path) < step_of(saved)]
    removable = [path for path in earlier if best is None or path.name != Path(best).name]
    protected = 1 + len(earlier) - len(removable)
    superfluous = [] if limit is None else removable[max(0, limit - protected) :]
    return [*superfluous, *(path for path in checkpoints if step_of(path) > step_of(saved))]
