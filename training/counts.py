"""What is counted of a run."""

from __future__ import annotations

from dataclasses import dataclass


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
