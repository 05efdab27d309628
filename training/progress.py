"""Counts, times and memory of a run: what its log lines report and its checkpoints keep.

B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from chat.label_mask import IGNORE_INDEX


@dataclass
class Counts:
    """Sums over optimizer steps and over all ranks.

    Attributes:
        loss: sum of the steps' losses.
        correct: targets whose most likely token is the right one, out of ``targets``.
        tokens: positions that are not padding, out of ``slots``.
        samples: examples, of which a pack has several.
    """

    steps: int = 0
    loss: float = 0.0
    correct: int = 0
    targets: int = 0
    tokens: int = 0
    slots: int = 0
    samples: int = 0

    def add(self, other: Counts) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def token_accuracy(self) -> float:
        return self.correct / max(self.targets, 1)

    @property
    def padding(self) -> float:
        """Share of the positions that are padding."""
        return 1 - self.tokens / self.slots if self.slots else 0.0


class Progress:
    """Counts and times of a run so far, including those before the checkpoint that it resumes from.

    The trainer adds every optimizer step; the run log saves it in checkpoints and restores it.

    Attributes:
        total: counts since the start of the run.
        window: counts since the last log line.
        window_started: when the window began, moved forward by the time that is spent on evaluating and saving.
    """

    def __init__(self) -> None:
        self.total, self.window = Counts(), Counts()
        self.window_started = self._run_started = self._process_started = time.monotonic()
        self._steps_here = 0  # in this process: a resumed run has done others before

    def start(self) -> None:
        """Start the clocks of this process's training."""
        self.window_started = self._process_started = time.monotonic()

    def add(self, step: Counts) -> None:
        self.window.add(step)
        self.total.add(step)
        self._steps_here += 1

    def elapsed(self) -> float:
        """Return the seconds of training so far."""
        return round(time.monotonic() - self._run_started, 3)

    def seconds_left(self, steps: int) -> float:
        """Return the time that more steps take, at the average speed of this process."""
        return (time.monotonic() - self._process_started) / max(1, self._steps_here) * steps

    def end_window(self, steps_left: int) -> dict[str, float]:
        """Return the figures of a log line about the current window, and begin a new one."""
        window, now = self.window, time.monotonic()
        peaks = peak_memory()
        figures = {
            "loss": window.loss / window.steps,
            "token_accuracy": round(window.token_accuracy, 6),
            "tokens_per_second": round(window.tokens / (now - self.window_started), 1),
            "padding": round(window.padding, 4),
            "peak_memory_gib": peaks.get("gpu_gib", peaks["cpu_gib"]),
            "eta_seconds": round(self.seconds_left(steps_left), 1),
        }
        self.window, self.window_started = Counts(), now
        return figures

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {
            "elapsed": self.elapsed(),
            "counts": asdict(self.total),
            "window": asdict(self.window),
            "window_seconds": round(time.monotonic() - self.window_started, 3),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the state of a checkpoint; an empty one starts a run."""
        self._run_started = time.monotonic() - state.get("elapsed", 0)
        self.total, self.window = (_read_counts(state.get(name, {})) for name in ("counts", "window"))
        self.window_started -= state.get("window_seconds", 0)


def count_targets(batch: Mapping[str, Any]) -> Tensor:
    """Return the number of targets in a batch; the first token of a row is never one."""
    return (batch["labels"][:, 1:] != IGNORE_INDEX).sum()


def count_tokens(batch: Mapping[str, Any]) -> Tensor | int:
    """Return the number of positions that are not padding; a batch without a mask has none."""
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else mask.sum()


def weigh_targets(batch: Mapping[str, Any]) -> Tensor:
    """Return the sum of the targets' ``loss_weights``, or the number of targets if the batch has none."""
    if (weights := batch.get("loss_weights")) is None:
        return count_targets(batch)
    return weights[:, 1:].masked_fill(batch["labels"][:, 1:] == IGNORE_INDEX, 0).sum()


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the number of targets whose most likely token is right.

    Args:
        logits: [B, T, V].
        labels: [B, T], not shifted.
    """
    targets = labels[:, 1:].to(logits.device)
    return ((logits[:, :-1].argmax(-1) == targets) & (targets != IGNORE_INDEX)).sum()


def peak_memory() -> dict[str, float]:
    """Return the peak memory so far in GiB, of the process and, if there is one, of the GPU."""
    # Linux counts in KiB, macOS in bytes.
    unit = 2**10 if sys.platform != "darwin" else 1
    peaks = {"cpu_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 3)}
    if torch.cuda.is_available():
        peaks["gpu_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
    return peaks


def _read_counts(saved: Mapping[str, int]) -> Counts:
    """Return saved counts, without those that this version does not count."""
    return Counts(**{item.name: saved[item.name] for item in fields(Counts) if item.name in saved})
