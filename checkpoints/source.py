"""TensorSource: the tensors of a checkpoint by name, read from files or computed on demand.

A source that changes another one (dequantised, merged, renamed) stores no tensors: to return some rows it reads the
rows it needs from the source below it. A whole model passes through a chain of sources in the memory of a few rows.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of a tensor that are computed and written at a time: 4 MiB in float32, which stay in a processor's cache.
BLOCK_ELEMENTS = 2**20


class TensorSource(ABC):
    """The tensors of a checkpoint by name."""

    @abstractmethod
    def names(self) -> list[str]:
        """All names, in the order in which they are written, without a tied head."""

    @abstractmethod
    def __contains__(self, name: str) -> bool: ...

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]: ...

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which the tensor is stored or will be written."""

    @abstractmethod
    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """``tensor[start:stop]``: in ``dtype(name)`` if stored, in float32 if computed (the writer rounds it once).

        The result may be a read-only view of a file: copy it before changing it in place.
        """

    def unrounded(self) -> TensorSource:
        """The same tensors before a source that rounds them itself; otherwise this source."""
        return self

    def read(self, name: str) -> Tensor:
        """The whole tensor, in the dtype of :meth:`rows`."""
        return self.rows(name)

    def nbytes(self, name: str) -> int:
        """The size of the tensor in bytes, in ``dtype(name)``."""
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    def total_nbytes(self) -> int:
        """The size of all tensors in bytes."""
        return sum(self.nbytes(name) for name in self.names())

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield the tensor in blocks of rows of at most ``BLOCK_ELEMENTS`` elements (at least one row)."""
        shape = self.shape(name)
        if not shape:
            yield self.read(name)
            return
        for start, stop in row_blocks(shape[0], math.prod(shape[1:])):
            yield self.rows(name, start, stop)


class View(TensorSource):
    """The tensors of the source ``below``, unchanged; a subclass overrides what it changes."""

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
    """The tensors of another source, with floating-point tensors written in ``target``."""

    def __init__(self, below: TensorSource, target: torch.dtype) -> None:
        super().__init__(below)
        self.target = target

    def dtype(self, name: str) -> torch.dtype:
        stored = self.below.dtype(name)
        return self.target if stored.is_floating_point else stored


def row_blocks(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of blocks of rows of a matrix, each of at most ``BLOCK_ELEMENTS`` elements."""
    step = max(1, BLOCK_ELEMENTS // max(1, width))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def main_dtype(source: TensorSource) -> torch.dtype:
    """The floating-point dtype of most of a checkpoint's bytes; float32 if it contains none."""
    sizes: Counter[torch.dtype] = Counter()
    for name in source.names():
        if (dtype := source.dtype(name)).is_floating_point:
            sizes[dtype] += source.nbytes(name)
    return sizes.most_common(1)[0][0] if sizes else torch.float32


def reuse_freed_memory() -> None:
    """Let this process keep up to 64 MiB of freed blocks for the next ones.

    Otherwise the system takes them back and clears every page again, which takes longer than most computations. glibc
    adapts its limits to the largest block that was freed so far; other C libraries ignore it.
    """
    torch.empty(2**25 - 2**13, dtype=torch.uint8)  # the largest that counts; no page of it is touched


def is_finite(tensor: Tensor) -> bool:
    """Return whether no value is NaN or infinite; allocates no mask, unlike ``isfinite().all()``."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.dtype.itemsize == 1:  # the reductions do not support 8-bit floats
        tensor = tensor.to(torch.float32)
    # A sum takes half the time of extremes, but that of finite values may overflow.
    return math.isfinite(tensor.sum()) or all(math.isfinite(extreme) for extreme in torch.aminmax(tensor))
