"""How a run shows its steps: log lines, and on a terminal a progress bar below them that keeps to its width."""

from __future__ import annotations

import logging
import sys
from datetime import timedelta
from typing import Any

from tqdm import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from console import terminal_width
from training.progress import Progress

logger = logging.getLogger(__name__)

# Key of transformers' logs: its key in training_log.jsonl, and its format in a log line. A line that is too long for
# the terminal ends earlier.
KEYS = {
    "loss": ("loss", "loss {:.4f}"),
    "eval_loss": ("eval_loss", "evaluation loss {:.4f}"),
    "token_accuracy": ("token_accuracy", "accuracy {:.1%}"),
    "eval_token_accuracy": ("eval_token_accuracy", "accuracy {:.1%}"),
    "eval_exact_match": ("eval_exact_match", "exact match {:.1%}"),
    "eval_contains": ("eval_contains", ""),
    "eval_rouge_l": ("eval_rouge_l", "ROUGE-L {:.3f}"),
    "eval_chrf": ("eval_chrf", "chrF {:.3f}"),
    "eval_valid_json": ("eval_valid_json", "valid JSON {:.1%}"),
    "eval_call_name": ("eval_call_name", "right function {:.1%}"),
    "eval_call_arguments": ("eval_call_arguments", "right call {:.1%}"),
    "eval_stopped": ("eval_stopped", "stopped {:.1%}"),
    "eval_answer_tokens": ("eval_answer_tokens", "{:.1f} tokens per answer"),
    "learning_rate": ("lr", "lr {:.2e}"),
    "learning_rate_b": ("lr_b", "of B {:.2e}"),
    "grad_norm": ("grad_norm", "grad norm {:.3g}"),
    "tokens_per_second": ("tokens_per_second", "{:,.0f} tokens/s"),
    "padding": ("padding", "padding {:.0%}"),
    "peak_memory_gib": ("peak_memory_gib", "peak {:.1f} GiB"),
    "eta_seconds": ("eta_seconds", ""),
    "epoch": ("epoch", ""),
}
_OF_SOURCES = ("exact_match", "rouge_l", "loss")  # which a log line has of each source, the first of them that it has
_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
_EVALUATION_BAR = "evaluation {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}"
_TIME_AND_LEVEL = len("00:00:00 INFO ")


def draws_bars(disable_tqdm: bool | None) -> bool:
    """Return whether progress bars are drawn: as ``--disable_tqdm`` says, by default on a terminal only."""
    return terminal_width(sys.stderr) is not None if disable_tqdm is None else not disable_tqdm


def is_measured(logs: dict[str, Any]) -> bool:
    """Return whether the logs are of a step or an evaluation; transformers also logs the run time at the end."""
    return "loss" in logs or "eval_loss" in logs


def measured_values(logs: dict[str, Any]) -> dict[str, float]:
    """Return the figures of logs by their keys in ``training_log.jsonl``, those of single sources included."""
    ends = tuple(f"_{name.removeprefix('eval_')}" for name in KEYS if name.startswith("eval_"))
    keys = {name: key for name, (key, _) in KEYS.items()}
    keys |= {name: name for name in logs if name.startswith("eval_") and name.endswith(ends) and name not in keys}
    return {key: float(logs[name]) for name, key in keys.items() if name in logs}


def _describe_sources(logs: dict[str, Any]) -> list[str]:
    """Return a figure of each source of the evaluation data, if there are several."""
    for name in _OF_SOURCES:
        sources = [key for key in logs if key.startswith("eval_") and key.endswith(f"_{name}") and key not in KEYS]
        if sources:
            label, text = KEYS[f"eval_{name}"][1].removeprefix("evaluation ").rsplit(" ", 1)
            of_each = [
                f"{key.removeprefix('eval_').removesuffix(f'_{name}')} {text.format(logs[key])}" for key in sources
            ]
            return [f"{label} of {', '.join(of_each)}"]
    return []


def describe_logs(logs: dict[str, Any], width: int | None = None) -> str:
    """Format logs as ``loss 1.2345, accuracy 71.3%, ...``; empty if they contain no loss.

    Args:
        width: leave out the last figures that exceed it; all are in ``training_log.jsonl``.
    """
    if not is_measured(logs):
        return ""
    parts = [text.format(logs[name]) for name, (_, text) in KEYS.items() if text and name in logs]
    parts += _describe_sources(logs)
    while width is not None and len(parts) > 1 and len(", ".join(parts)) > width:
        parts.pop()
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def log_line(state: TrainerState, logs: dict[str, Any], width: int | None = None, with_time: bool = True) -> str:
    """Return ``step 3/9: loss ..., 0:01:02 left``."""
    start = f"step {state.global_step}/{state.max_steps}: "
    end = f", {_duration(logs['eta_seconds'])} left" if with_time and "eta_seconds" in logs else ""
    return start + describe_logs(logs, None if width is None else width - len(start) - len(end)) + end


class LogLines(TrainerCallback):
    """A log line per logged step, instead of transformers' printed dict."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs and is_measured(logs):
            width = terminal_width(sys.stderr)
            logger.info("%s", log_line(state, logs, None if width is None else width - _TIME_AND_LEVEL))


class ProgressBar(ProgressCallback):
    """transformers' progress bar in one row, below the log lines; the bar alone shows the remaining time.

    Args:
        progress: of the run, which knows the time left.
    """

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self.progress = progress

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.current_step = state.global_step
        if state.is_world_process_zero:
            self.training_bar = _open_bar(state.max_steps, _BAR, initial=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.training_bar is not None:
            left = _duration(self.progress.seconds_left(state.max_steps - state.global_step))
            self.training_bar.set_postfix_str(f"{left} left", refresh=False)
        super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and self.prediction_bar is None:
            self.prediction_bar = _open_bar(len(eval_dataloader), _EVALUATION_BAR, leave=False)
        super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is not None and logs and is_measured(logs):
            width = terminal_width(sys.stderr)
            self.training_bar.write(log_line(state, logs, width and width - 1, with_time=False), file=sys.stderr)


def _open_bar(total: int, bar_format: str, initial: int = 0, leave: bool = True) -> Any:
    bar = tqdm(total=total, initial=initial, leave=leave, bar_format=bar_format, dynamic_ncols=True)
    # tqdm ignores COLUMNS, and its older versions fill a column more than they are told.
    bar.dynamic_ncols = lambda stream: ((terminal_width(sys.stderr) or 80) - 2, None)
    bar.refresh()
    return bar
