"""Sizes that a rehearsal takes and returns."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchShape:
    """The largest micro-batch of a run.

    Attributes:
        lengths: tokens of each of its samples.
        targets: trained tokens of all of them.
    """

    lengths: tuple[int, ...]
    targets: int


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
