"""Sizes that a rehearsal takes and returns."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchShape:
    """The largest micro-batch of a run, or the largest row of joined ones.

    Attributes:
        lengths: tokens of each of its samples.
        targets: trained tokens of all of them.
        per_step: computed in an optimizer step, on average; ``None``: as many as are accumulated.
    """

    lengths: tuple[int, ...]
    targets: int
    per_step: float | None = None


@dataclass(frozen=True)
class ParameterSize:
    """A parameter of the model, with that of its adapter.

    Attributes:
        elements: of the tensor as it is stored: two weights of a 4-bit layer are one.
        block: number of the block that it belongs to; ``None``: to none.
    """

    name: str
    elements: int
    bytes: int
    is_trained: bool
    block: int | None
