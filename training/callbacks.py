"""What a run says of itself: a line of JSON per logged step, a curve of the loss and a summary."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

if TYPE_CHECKING:
    from training.trainer import QwenTrainer

TRAINING_LOG = "training_log.jsonl"
LOSS_CURVE = "training_loss.png"
_LOGGED = ("loss", "eval_loss", "learning_rate", "grad_norm", "epoch")


class RunLog(TrainerCallback, ExportableState):
    """Appends every logged step to ``training_log.jsonl`` and draws the loss when training ends.

    Each line has ``step``, ``elapsed`` (seconds of training), ``tokens`` (targets so far) and what was logged of
    ``loss``, ``eval_loss``, ``lr``, ``grad_norm`` and ``epoch``.
    """

    def __init__(self, folder: str | Path, resumes: bool = False) -> None:
        self.path = Path(folder) / TRAINING_LOG
        self.resumes = resumes
        self.trainer: QwenTrainer | None = None
        self.started = time.monotonic()
        self.rows: list[dict[str, Any]] = []

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed run goes on counting."""
        return {"args": {}, "attributes": {"tokens": self._tokens(), "elapsed": self.elapsed()}}

    def _tokens(self) -> int:
        return self.trainer.trained_tokens if self.trainer is not None else 0

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
            self.trainer.trained_tokens = before.get("tokens", 0)
        if not state.is_world_process_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.resumes and self.path.exists():
            # Steps after the checkpoint happen again.
            self.rows = [row for row in _read_rows(self.path) if row["step"] <= state.global_step]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        values = {name: float((logs or {})[name]) for name in _LOGGED if name in (logs or {})}
        if "loss" not in values and "eval_loss" not in values:
            return
        if "learning_rate" in values:
            values["lr"] = values.pop("learning_rate")
        row = {"step": state.global_step, **values, "elapsed": self.elapsed(), "tokens": self._tokens()}
        self.rows.append(row)
        if state.is_world_process_zero:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            plot_losses(self.rows, self.path.parent / LOSS_CURVE)

    def losses(self, name: str = "loss") -> list[float]:
        """The logged values of ``loss`` or ``eval_loss``, in order."""
        return [row[name] for row in self.rows if name in row]


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; the last may be cut where the machine stopped."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def plot_losses(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw training and evaluation loss over steps to a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, label in (("loss", "training"), ("eval_loss", "evaluation")):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 50 else None)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per target)")
    if axes.lines:
        axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def peak_memory() -> dict[str, float]:
    """Peak memory so far in GiB: of the process, and of the GPU where there is one."""
    # Linux counts in KiB, macOS in bytes.
    unit = 2**10 if sys.platform != "darwin" else 1
    peaks = {"cpu_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 3)}
    if torch.cuda.is_available():
        peaks["gpu_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
    return peaks


def versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    packages = ("torch", "transformers", "peft", "accelerate", "safetensors", "tiktoken")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}
