"""Callbacks of a run: ``training_log.jsonl``, the interval of logging, early stopping."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

from checkpoints.files import save_text
from checkpoints.names import TRAINING_LOG
from training.config.args import RunArguments, parse_profile_steps
from training.config.intervals import SHORT_RUN
from training.display import is_measured, measured_values
from training.profiling import Profiler
from training.progress import Progress
from training.run_folder.curves import Row, load_rows


def build_callbacks(args: RunArguments, log: RunLog) -> list[TrainerCallback]:
    """Return the run log, and the callbacks of ``--profile_steps`` and ``--early_stopping_patience``.

    Raises:
        ConfigError: ``--profile_steps`` is not a range.
    """
    options = args.options
    callbacks: list[TrainerCallback] = [log]
    if args.trainer_value("logging_steps") is None:
        callbacks.append(ShortRunLogging())
    if options.profile_steps is not None:
        callbacks.append(Profiler(args.output_dir, *parse_profile_steps(options.profile_steps)))
    if options.early_stopping_patience is not None:
        callbacks.append(EarlyStopping(options.early_stopping_patience))
    return callbacks


class ShortRunLogging(TrainerCallback):
    """Logs each step of a short run, whose default interval might log no or one line only."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.max_steps <= SHORT_RUN:
            state.logging_steps = 1


class EarlyStopping(EarlyStoppingCallback):
    """transformers' early stopping, whose counter is restored from a checkpoint; a reached limit stops at once."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        callback_states: Any = state.stateful_callbacks
        saved = callback_states.get(type(self).__name__, {}).get("attributes", {})
        self.early_stopping_patience_counter = saved.get("early_stopping_patience_counter", 0)
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True


class RunLog(TrainerCallback, ExportableState):
    """The run's log: appends every logged step to ``training_log.jsonl``.

    Each line has ``step``, ``elapsed`` (seconds of training), ``tokens`` (targets) and ``samples`` so far, ``epoch``,
    and either ``eval_loss``, ``eval_token_accuracy`` and further ``eval_`` figures (of answers, and of each source with
    its name, as in ``eval_NAME_loss``), or ``loss``, ``token_accuracy``, ``lr``, ``grad_norm``,
    ``tokens_per_second`` (all but padding), ``padding`` (a share), ``peak_memory_gib`` and ``eta_seconds``.
    """

    def __init__(self, folder: str | Path, progress: Progress, resumes: bool = False) -> None:
        self.path = Path(folder) / TRAINING_LOG
        self.progress, self.resumes = progress, resumes
        self.rows: list[Row] = []

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, so that a resumed run continues counting."""
        return {"args": {}, "attributes": {**self.progress.state(), "rows": len(self.rows)}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # From a checkpoint this is a dict, contrary to its annotation.
        callback_states: Any = state.stateful_callbacks
        saved = callback_states.get(type(self).__name__, {}).get("attributes", {}) if self.resumes else {}
        self.progress.restore(saved)
        if not state.is_world_process_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.resumes and self.path.exists():
            # Steps after the checkpoint are trained, and logged, again.
            rows = [row for row in load_rows(self.path, strict=False) if row["step"] <= state.global_step]
            self.rows = rows[: saved.get("rows", len(rows))]
        save_text("".join(json.dumps(row) + "\n" for row in self.rows), self.path)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or not is_measured(logs):
            return
        values = measured_values(logs)
        total = self.progress.total
        counts = {"elapsed": self.progress.elapsed(), "tokens": total.targets, "samples": total.samples}
        row = {"step": state.global_step, **values, **counts}
        self.rows.append(row)
        if state.is_world_process_zero:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def losses(self, name: str = "loss") -> list[float]:
        """Return the logged values of ``loss``, ``eval_loss`` or another key, in order."""
        return [row[name] for row in self.rows if name in row]


def set_tensorboard_folder(callbacks: Sequence[TrainerCallback], folder: str | None) -> None:
    """Write TensorBoard's files to ``--logging_dir``; transformers would read it from an environment variable."""
    from transformers.integrations.integration_utils import TensorBoardCallback

    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.logging_dir = None if folder is None else os.path.expanduser(folder)
