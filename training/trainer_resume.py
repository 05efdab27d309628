"""Corrections to how transformers' Trainer resumes, so that a resumed run ends like an uninterrupted one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from training.run_folder.manifest import checkpoints_in, step_of


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
    """Give callbacks that a checkpoint does not know an empty state, which transformers expects."""
    callback_states: Any = state.stateful_callbacks  # a dict once it has been loaded
    for callback in callbacks:
        if isinstance(callback, ExportableState):
            callback_states.setdefault(type(callback).__name__, {"args": {}, "attributes": {}})


@contextmanager
def keeping_dtypes(model: nn.Module) -> Iterator[None]:
    """Restore the parameters' dtypes after the block: peft widens 16-bit parameters to float32 when it loads them."""
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    yield
    for name, parameter in model.named_parameters():
        if parameter.dtype != dtypes[name]:
            parameter.data = parameter.data.to(dtypes[name])


def set_learning_rate(scheduler: Any, learning_rate: float) -> None:
    """Scale a loaded schedule to the learning rate of the command; transformers silently keeps the checkpoint's."""
    base_rates = getattr(scheduler, "base_lrs", [])
    if set(base_rates) <= {learning_rate}:
        return
    groups = scheduler.optimizer.param_groups
    for group, base_rate in zip(groups, base_rates, strict=True):
        factor = group["lr"] / base_rate if base_rate else 0.0
        group["initial_lr"], group["lr"] = learning_rate, learning_rate * factor
    scheduler.base_lrs = [learning_rate] * len(base_rates)
    scheduler._last_lr = [group["lr"] for group in groups]  # the log reads it


def remove_superseded(saved: Path, limit: int | None, best: str | None) -> None:
    """Remove the checkpoints that a newly saved one supersedes.

    Those of later steps belong to steps that are trained again, and would be taken for the newest. Of the earlier ones
    the oldest beyond ``--save_total_limit`` are removed, but never the best.

    Args:
        saved: the new checkpoint, complete.
        limit: ``--save_total_limit``.
        best: the folder of the best checkpoint so far.
    """
    checkpoints = checkpoints_in(saved.parent)
    earlier = [path for path in checkpoints if step_of(path) < step_of(saved)]
    removable = [path for path in earlier if best is None or path.name != Path(best).name]
    protected = 1 + len(earlier) - len(removable)
    superfluous = [] if limit is None else removable[max(0, limit - protected) :]
    for path in (*superfluous, *(path for path in checkpoints if step_of(path) > step_of(saved))):
        shutil.rmtree(path, ignore_errors=True)
