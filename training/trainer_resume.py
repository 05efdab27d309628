"""What transformers' Trainer leaves open when it goes on from a checkpoint."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from training.run_folder.manifest import checkpoints_in, step_of
from training.trainer_engines import EngineTrainer


class ResumingTrainer(EngineTrainer):
    """transformers' Trainer, whose resumed run ends as the uninterrupted one does."""

    _resumed: str | None = None
    _is_behind_epoch = False  # whether the checkpoint is that of the last step of an epoch

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ends = EpochEnds()
        self.add_callback(self._ends)

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, epochs: int, checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        """When is saved, evaluated and logged is what the command says, not what the checkpoint remembers."""
        places = super()._init_training_state(max_steps, steps_per_epoch, epochs, checkpoint, trial)
        self.state.compute_steps(self.args, max_steps)
        if checkpoint is not None:
            kept: Any = self.state.stateful_callbacks
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ExportableState):  # the checkpoint may know fewer of them
                    kept.setdefault(type(callback).__name__, {"args": {}, "attributes": {}})
            self._resumed, self._is_behind_epoch = checkpoint, self.state.global_step % steps_per_epoch == 0
        return places

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Nothing, where the checkpoint is that of the last step: transformers would take one more."""
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self.control.should_training_stop = True
            return
        self._end_epoch()
        super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._end_epoch()
        return super()._finalize_training(*args, **kwargs)

    def _end_epoch(self) -> None:
        """Do what is due at the end of an epoch, if the run died between its last step and that."""
        checkpoint, self._resumed = self._resumed, None
        if checkpoint is None or not (self._is_behind_epoch or self.control.should_training_stop):
            return
        if self._ends.last in (None, self.state.global_step):
            return
        self._load_rng_state(checkpoint)
        self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
        norm, rate = self._ends.grad_norm, self._ends.learning_rate
        self._maybe_log_save_evaluate(self._tr_loss, norm, self.model_wrapped, None, 0, None, time.time(), rate)

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        self._ends.grad_norm = None if grad_norm is None else float(grad_norm)
        self._ends.learning_rate = kwargs.get("learning_rate")
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """What trains keeps its precision: peft would widen to float32 what was held in 16 bits."""
        held: Any = self.model
        dtypes = {name: parameter.dtype for name, parameter in held.named_parameters()}
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for name, parameter in held.named_parameters():
            if parameter.dtype != dtypes[name]:
                parameter.data = parameter.data.to(dtypes[name])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The learning rate is the command's: transformers would go on with the checkpoint's and say nothing."""
        super()._load_optimizer_and_scheduler(checkpoint)
        scheduler: Any = self.lr_scheduler
        bases, wanted = getattr(scheduler, "base_lrs", []), self.args.learning_rate
        if checkpoint is None or set(bases) <= {wanted}:
            return
        for group, base in zip(scheduler.optimizer.param_groups, bases, strict=True):
            factor = group["lr"] / base if base else 0.0
            group["initial_lr"], group["lr"] = wanted, wanted * factor
        scheduler.base_lrs = [wanted] * len(bases)
        scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]  # what logs are made of


class EpochEnds(TrainerCallback, ExportableState):
    """Keeps in checkpoints behind which step an epoch was last ended, and what its end says of the step before.

    Attributes:
        last: the step; not known of a checkpoint of an earlier version.
    """

    last: int | None = 0
    grad_norm: float | None = None
    learning_rate: float | None = None

    def state(self) -> dict[str, Any]:
        kept = {"last": self.last, "grad_norm": self.grad_norm, "learning_rate": self.learning_rate}
        return {"args": {}, "attributes": kept}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kept: Any = state.stateful_callbacks
        known = kept[type(self).__name__]["attributes"]
        self.last = known.get("last")
        self.grad_norm, self.learning_rate = known.get("grad_norm"), known.get("learning_rate")

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.last = state.global_step


def remove_superseded(saved: Path, limit: int | None, best: str | None) -> None:
    """Remove the checkpoints that one which has just been saved makes superfluous.

    Those of later steps are of a past that happens again, and would be taken for the newest. Of the others the oldest
    go beyond ``--save_total_limit``; the best one stays.

    Args:
        saved: the new checkpoint, which is whole.
        limit: ``--save_total_limit``.
        best: the folder of the best checkpoint so far.
    """
    every = checkpoints_in(saved.parent)
    earlier = [path for path in every if step_of(path) < step_of(saved)]
    others = [path for path in earlier if best is None or path.name != Path(best).name]
    kept = 1 + len(earlier) - len(others)
    superfluous = [] if limit is None else others[max(0, limit - kept) :]
    for path in (*superfluous, *(path for path in every if step_of(path) > step_of(saved))):
        shutil.rmtree(path, ignore_errors=True)
