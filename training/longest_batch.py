"""The longest micro-batch of a run: found from lengths and order, and tried before the first optimizer step.

On a GPU memory that does not suffice then shows within the first minute, not when the batch's turn comes. Nothing of
the trial remains: its gradients are dropped, and the random states are those from before it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from commands import is_out_of_memory, memory_fix
from errors import RunError, one_line
from training.joined_rows import Joining, token_budget
from training.samplers import EpochSampler

_APART = Joining()


@dataclass(frozen=True)
class Batch:
    """A micro-batch, or several joined ones: the indices of its items, and the positions that it computes."""

    indices: tuple[int, ...]
    positions: int

    def __str__(self) -> str:
        return f"the longest micro-batch of the run ({len(self.indices)} items, {self.positions:,} positions)"


def find_longest(
    lengths: Sequence[int],
    orders: Iterable[Sequence[int]],
    size: int,
    is_padded: bool,
    limit: int,
    joining: Joining = _APART,
) -> Batch:
    """Return the micro-batch that computes most positions, joined as they are in a step.

    Args:
        lengths: tokens of each item; those beyond are blanks, of one token.
        orders: the items of each epoch, in order.
        size: items of a micro-batch.
        is_padded: every item takes as many positions as the longest of its micro-batch.
        limit: micro-batches of the run.
    """
    known, best = np.asarray(lengths), Batch((), 0)
    bound = int(known.max() * size) if is_padded else token_budget(known, size)
    for order in orders:
        items = np.asarray(order[: limit * size])
        if not len(items) or best.positions >= bound:
            break
        grown, begins = joining.grow(positions_of(known, items, size, is_padded))
        first = last = int(grown.argmax())
        if grown[last] > best.positions:
            while not begins[first]:
                first -= joining.processes
            batches = range(first, last + 1, joining.processes)
            chosen = np.concatenate([items[batch * size : (batch + 1) * size] for batch in batches])
            best = Batch(tuple(chosen[chosen < len(known)].tolist()), int(grown[last]))
        limit -= len(grown)
    return best


def positions_of(lengths: Sequence[int] | NDArray[Any], order: Any, size: int, is_padded: bool) -> NDArray[Any]:
    """Return the positions of each micro-batch of an order; see ``find_longest``."""
    known, items = np.asarray(lengths), np.asarray(order)
    sizes = np.where(items < len(known), known[np.minimum(items, len(known) - 1)], 1)
    rows = np.pad(sizes, (0, -len(sizes) % size)).reshape(-1, size)
    positions: NDArray[Any] = rows.max(1) * (rows > 0).sum(1) if is_padded else rows.sum(1)
    return positions


def epoch_orders(sampler: EpochSampler, epochs: Iterable[int]) -> Iterator[list[int]]:
    """Yield the items of each epoch as a sampler draws them, whose epoch stays what it is."""
    current = sampler.epoch
    for epoch in epochs:
        sampler.set_epoch(epoch)
        try:
            order = list(sampler)
        finally:
            sampler.set_epoch(current)
        yield order


@contextmanager
def unchanged_training(model: nn.Module, optimizer: Any, accumulates: bool) -> Iterator[None]:
    """Reserve what a later step holds, then drop all gradients and restore the random states.

    Args:
        optimizer: torch's AdamW allocates its moments in the first step; their size is reserved here.
        accumulates: gradients of earlier micro-batches are there when a later one is computed.
    """
    devices = [parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"][:1]
    states = random.getstate(), np.random.get_state()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    has_moments = isinstance(getattr(optimizer, "optimizer", optimizer), torch.optim.AdamW) and not optimizer.state
    moments = [torch.empty_like(parameter) for parameter in trained for _ in range(2) if has_moments]
    try:
        with torch.random.fork_rng(devices):
            if accumulates:
                for parameter in trained:
                    parameter.grad = torch.zeros_like(parameter)
            yield
    finally:
        moments.clear()
        model.zero_grad()
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextmanager
def memory_errors(place: Callable[[], str], advice: Callable[[], list[str]]) -> Iterator[None]:
    """Raise ``RunError`` with place and advice for memory that does not suffice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RunError) or not is_out_of_memory(error):
            raise
        raise RunError(f"{place()}: out of memory ({one_line(error)})", memory_fix(advice())) from error
