"""What is counted of a run."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass

import torch


@dataclass
class Counts:
    """Sums over optimizer steps and over all processes.

    Attributes:
        loss: sum of the steps' losses.
        correct: targets whose most likely token was right, of ``targets``.
        tokens: positions that are no padding, of ``slots``.
    """

    steps: int = 0
    loss: float = 0.0
    correct: int = 0
    targets: int = 0
    tokens: int = 0
    slots: int = 0

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


def peak_memory() -> dict[str, float]:
    """Peak memory so far in GiB: of the process, and of the GPU where there is one."""
    # Linux counts in KiB, macOS in bytes.
    unit = 2**10 if sys.platform != "darwin" else 1
    peaks = {"cpu_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 3)}
    if torch.cuda.is_available():
        peaks["gpu_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
    return peaks
