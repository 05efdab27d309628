"""The micro-batches of an optimizer step as fewer, longer rows: larger matrix products, the same samples in each step.

A row takes no more tokens than the longest samples of a micro-batch have together, so it needs no more memory than a
micro-batch of this data and this size may need anyway. Which are joined depends on the samples of the step alone.

B samples of a row, N tokens of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Batch = dict[str, Any]


@dataclass(frozen=True)
class Joining:
    """Which micro-batches become one row: those that follow one another in a step of a rank, up to a budget.

    Attributes:
        budget: most tokens of a joined row; 0 joins nothing.
        accumulation: micro-batches of an optimizer step of a rank.
        processes: ranks, which take the micro-batches of an epoch in turn.
    """

    budget: int = 0
    accumulation: int = 1
    processes: int = 1

    def grow(self, positions: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return for each micro-batch the positions of its row up to its end, and whether the row begins with it.

        Args:
            positions: of the micro-batches of an epoch, in order.
        """
        missing = -len(positions) % (self.accumulation * self.processes)
        grown = np.pad(positions, (0, missing)).reshape(-1, self.accumulation, self.processes)
        begins = np.ones(grown.shape, dtype=bool)
        for number in range(1, self.accumulation):
            longer = grown[:, number - 1] + grown[:, number]
            begins[:, number] = longer > self.budget
            grown[:, number] = np.where(begins[:, number], grown[:, number], longer)
        return grown.ravel()[: len(positions)], begins.ravel()[: len(positions)]

    def rows_per_step(self, positions: NDArray[Any]) -> float:
        """Return the mean number of rows of an optimizer step of a rank; see ``grow``."""
        return self.accumulation * float(self.grow(positions)[1].mean())


def token_budget(lengths: Sequence[int] | NDArray[Any], size: int) -> int:
    """Return the tokens of the ``size`` longest items together: the budget of micro-batches of ``size`` items."""
    return int(np.sort(np.asarray(lengths))[-size:].sum())


def join_micro_batches(batches: Sequence[Batch], budget: int) -> list[Batch]:
    """Join the micro-batches of an optimizer step; each must be a row without padding.

    transformers counts the entries of a step, and ends it with the last. So there are as many as before: those that are
    no longer needed come first and are empty (``is_empty``). A micro-batch that is joined with no other stays as it is.
    """
    rows: list[list[Batch]] = []
    tokens = 0
    for batch in batches:
        size = batch["input_ids"].numel()
        if rows and tokens + size <= budget:
            rows[-1].append(batch)
            tokens += size
        else:
            rows.append([batch])
            tokens = size
    empty = [{"input_ids": batch["input_ids"][:, :0]} for batch in batches[len(rows) :]]
    return [*empty, *(join(row) if row[1:] else row[0] for row in rows)]


def is_empty(batch: Batch) -> bool:
    """Return whether a batch is a place that ``join_micro_batches`` has left without a row."""
    return bool(batch["input_ids"].numel() == 0)


def join(batches: Sequence[Batch]) -> Batch:
    """Return the row that the collator makes of the samples of several rows; their tensors may be on any device."""
    row: Batch = {
        name: torch.cat([batch[name] for batch in batches], dim=1) for name in ("input_ids", "labels", "position_ids")
    }
    if any("loss_weights" in batch for batch in batches):
        weights = [
            batch.get("loss_weights", torch.ones_like(batch["labels"], dtype=torch.float32)) for batch in batches
        ]
        row["loss_weights"] = torch.cat(weights, dim=1)
    starts = accumulate((batch["input_ids"].numel() for batch in batches[:-1]), initial=0)
    ends = [batch["cu_seq_lens_q"][1:] + start for batch, start in zip(batches, starts, strict=True)]
    bounds, longest = torch.cat([batches[0]["cu_seq_lens_q"][:1], *ends]), max(each["max_length_q"] for each in batches)
    row |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
    row["sequence_lengths"] = tuple(length for batch in batches for length in batch["sequence_lengths"])
    row["num_targets"] = sum(batch["num_targets"] for batch in batches)
    if indices := [index for batch in batches for index in batch.get("index", ())]:
        row["index"] = indices
    return row
