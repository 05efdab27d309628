"""What every form of a checkpoint's weights can be asked for, whether it lies in files or is computed on the way.

A form that changes another one (dequantised, folded, under other names) keeps no tensors: asked for some rows, it asks
the form below it for the rows that it needs. So a model passes through a chain of forms in the memory of a few rows.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of a tensor that are computed and written at a time: 16 MiB in float32.
BLOCK = 2**22


class TensorSource(ABC):
    """The tensors of a checkpoint by name."""

    @abstractmethod
    def names(self) -> list[str]:
        """All names, in the order they are written in. A tied head is not among them."""

    @abstractmethod
    def __contains__(self, name: str) -> bool: ...

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]: ...

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """What the tensor is stored in, or is to be stored in."""

    @abstractmethod
    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """``tensor[start:stop]``, in ``dtype(name)`` or, where it was computed, in float32: its writer rounds, once.

        It may be a read-only view of a file: copy it before changing it in place.
        """

    def read(self, name: str) -> Tensor:
        """The whole tensor, as :meth:`rows` gives it."""
        return self.rows(name)

    def nbytes(self, name: str) -> int:
        """The size of the tensor in ``dtype(name)``."""
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    def total_nbytes(self) -> int:
        """The size of all tensors."""
        return sum(self.nbytes(name) for name in self.names())

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The tensor's rows, some at a time, so that none of the pieces has many more than ``BLOCK`` elements."""
        shape = self.shape(name)
        if not shape:
            yield self.read(name)
            return
        for start, stop in row_blocks(shape[0], math.prod(shape[1:])):
            yield self.rows(name, start, stop)


class View(TensorSource):
    """The tensors of another source as they are; a form of its own changes what it has to."""

    def __init__(self, below: TensorSource) -> None:
        self.below = below

    def names(self) -> list[str]:
        return self.below.names()

    def __contains__(self, name: str) -> bool:
        return name in self.below

    def shape(self, name: str) -> tuple[int, ...]:
        return self.below.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.below.dtype(name)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self.below.rows(name, start, stop)


class InDtype(View):
    """The same tensors, floats to be stored in ``target``."""

    def __init__(self, below: TensorSource, target: torch.dtype) -> None:
        super().__init__(below)
        self.target = target

    def dtype(self, name: str) -> torch.dtype:
        stored = self.below.dtype(name)
        return self.target if stored.is_floating_point else stored


def row_blocks(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of the rows of a matrix, in pieces of about ``BLOCK`` elements."""
    step = max(1, BLOCK // max(1, width))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def main_dtype(source: TensorSource) -> torch.dtype:
    """The float type that most of a checkpoint's bytes are in; float32 where there are no floats."""
    sizes: Counter[torch.dtype] = Counter()
    for name in source.names():
        if (dtype := source.dtype(name)).is_floating_point:
            sizes[dtype] += source.nbytes(name)
    return sizes.most_common(1)[0][0] if sizes else torch.float32


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; unlike ``isfinite().all()`` it makes no tensor of the same size."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.dtype.itemsize == 1:  # has no minimum
        tensor = tensor.to(torch.float32)
    return all(bool(extreme.isfinite()) for extreme in torch.aminmax(tensor))
