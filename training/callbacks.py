"""What a run says of itself while it trains: log lines, the progress bar, a line of JSON per logged step, a curve."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import platform
import sys
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import (
    EarlyStoppingCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

from checkpoints.files import save_text
from training.config.args import RunArguments, parse_profile_steps
from training.profiling import Profiler
from training.progress import Counts
from training.run_folder.curves import LOSS_CURVE, TRAINING_LOG, Row, load_rows, plot_losses

if TYPE_CHECKING:
    from training.trainer import QwenTrainer

logger = logging.getLogger(__name__)

# What of transformers' logs goes to which key of the run's own log, and how a person reads it.
_KEYS = {
    "loss": ("loss", "loss {:.4f}"),
    "eval_loss": ("eval_loss", "evaluation loss {:.4f}"),
    "token_accuracy": ("token_accuracy", "accuracy {:.1%}"),
    "eval_token_accuracy": ("eval_token_accuracy", "accuracy {:.1%}"),
    "learning_rate": ("lr", "lr {:.2e}"),
    "grad_norm": ("grad_norm", "grad norm {:.3g}"),
    "tokens_per_second": ("tokens_per_second", "{:,.0f} tokens/s"),
    "padding": ("padding", "padding {:.0%}"),
    "peak_memory_gib": ("peak_memory_gib", "peak {:.1f} GiB"),
    "eta_seconds": ("eta_seconds", ""),
    "epoch": ("epoch", ""),
}


def build_callbacks(args: RunArguments, log: RunLog) -> list[TrainerCallback]:
    """What ``--profile_steps`` and ``--early_stopping_patience`` ask for, beside the run's log.

    Raises:
        ConfigError: ``--profile_steps`` is no range.
    """
    training = args.training
    callbacks: list[TrainerCallback] = [log]
    if training.profile_steps is not None:
        callbacks.append(Profiler(args.output_dir, *parse_profile_steps(training.profile_steps)))
    if training.early_stopping_patience is not None:
        callbacks.append(EarlyStopping(training.early_stopping_patience))
    return callbacks


def describe_logs(logs: dict[str, Any]) -> str:
    """``loss 1.2345, accuracy 71.3%, ...`` of what was logged; empty where it holds no loss."""
    if not _is_measured(logs):
        return ""
    return ", ".join(text.format(logs[name]) for name, (_, text) in _KEYS.items() if text and name in logs)


def _is_measured(logs: dict[str, Any]) -> bool:
    """transformers also logs how long a run took: what has a loss is a step or an evaluation."""
    return "loss" in logs or "eval_loss" in logs


def _log_line(state: TrainerState, logs: dict[str, Any]) -> str:
    left = f", {timedelta(seconds=round(logs['eta_seconds']))} left" if "eta_seconds" in logs else ""
    return f"step {state.global_step}/{state.max_steps}: {describe_logs(logs)}{left}"


class LogLines(TrainerCallback):
    """A log line per logged step, in the place of transformers' print of a dict."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs and _is_measured(logs):
            logger.info(_log_line(state, logs))


class ProgressBar(ProgressCallback):
    """transformers' progress bar, which also carries the last log line; the bar itself says how long is left."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is not None and logs and _is_measured(logs):
            if "loss" in logs:
                self.training_bar.set_postfix_str(describe_logs(logs))
            self.training_bar.write(_log_line(state, logs), file=sys.stderr)


class EarlyStopping(EarlyStoppingCallback):
    """transformers' own, which also goes on counting, or stops, where a checkpoint says so."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        kept: Any = state.stateful_callbacks
        before = kept.get(type(self).__name__, {})
        self.early_stopping_patience_counter = before.get("attributes", {}).get("early_stopping_patience_counter", 0)
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True


class RunLog(TrainerCallback, ExportableState):
    """Appends every logged step to ``training_log.jsonl`` and draws the loss when training ends.

    Each line has ``step``, ``elapsed`` (seconds of training), ``tokens`` (targets so far), ``epoch`` and either
    ``eval_loss`` and ``eval_token_accuracy``, or ``loss``, ``token_accuracy``, ``lr``, ``grad_norm``,
    ``tokens_per_second``, ``padding`` (a share), ``peak_memory_gib`` and ``eta_seconds``.
    """

    def __init__(self, folder: str | Path, resumes: bool = False) -> None:
        self.path = Path(folder) / TRAINING_LOG
        self.resumes = resumes
        self.trainer: QwenTrainer | None = None
        self.started = time.monotonic()
        self.rows: list[Row] = []

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed run goes on counting."""
        kept: dict[str, Any] = {"elapsed": self.elapsed(), "rows": len(self.rows)}
        if (trainer := self.trainer) is not None:
            kept |= {"counts": asdict(trainer.total), "window": asdict(trainer.window)}
            kept["window_seconds"] = round(time.monotonic() - trainer.window_started, 3)
        return {"args": {}, "attributes": kept}

    def elapsed(self) -> float:
        """Seconds of training so far, those before a resumed checkpoint included."""
        return round(time.monotonic() - self.started, 3)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Read from a checkpoint this is a dict, whatever it is declared to be.
        kept: Any = state.stateful_callbacks
        before = kept.get(type(self).__name__, {}).get("attributes", {}) if self.resumes else {}
        self.started = time.monotonic() - before.get("elapsed", 0)
        if self.trainer is not None:
            self.trainer.total = Counts(**before.get("counts", {}))
            self.trainer.window = Counts(**before.get("window", {}))
            self.trainer.window_started -= before.get("window_seconds", 0)
        if not state.is_world_process_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.resumes and self.path.exists():
            # What was said after the checkpoint is said again.
            rows = [row for row in load_rows(self.path, strict=False) if row["step"] <= state.global_step]
            self.rows = rows[: before.get("rows", len(rows))]
        save_text("".join(json.dumps(row) + "\n" for row in self.rows), self.path)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or not _is_measured(logs):
            return
        values = {key: float(logs[name]) for name, (key, _) in _KEYS.items() if name in logs}
        tokens = 0 if self.trainer is None else self.trainer.total.targets
        row = {"step": state.global_step, **values, "elapsed": self.elapsed(), "tokens": tokens}
        self.rows.append(row)
        if state.is_world_process_zero:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            plot_losses({"": self.rows}, self.path.parent / LOSS_CURVE)

    def losses(self, name: str = "loss") -> list[float]:
        """The logged values of ``loss``, ``eval_loss`` or another key, in order."""
        return [row[name] for row in self.rows if name in row]


def versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    packages = ("torch", "transformers", "peft", "accelerate", "safetensors", "tiktoken")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}
