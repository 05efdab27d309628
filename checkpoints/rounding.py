"""Round merged weights to 16 bits so that the learnt change survives.

An adapter changes most weights by less than half of the distance between two 16-bit numbers. Rounding to nearest moves
these back to where they were: the error of each weight is small, but all errors point against the change. ``dithered``
rounds to the neighbour above or below a value, to each as often as it is near, so that errors cancel where outputs are
summed. A value that 16 bits hold stays as it is.

Which neighbour is taken depends on the tensor's name and on the row and column alone: the result is the same whatever
the shards and the number of rows that are rounded at a time.

Shapes: a block has R rows of C columns.
"""

from __future__ import annotations

import zlib
from functools import lru_cache

import torch
from torch import Tensor

from checkpoints.model_config import Rounding
from checkpoints.source import is_finite

_GOLDEN = 40503
"""2^16 divided by the golden ratio: the thresholds of neighbouring columns are far apart."""

_GROUP = 2**20
"""Elements that are rounded at a time: with fewer, threads wait for each other longer than they compute."""

_OFFSETS = 2**10
"""Number of places in the sequence at which a group of rows may start."""


def round_rows(exact: Tensor, dtype: torch.dtype, rounding: Rounding, name: str, first_row: int) -> Tensor:
    """Round rows of a matrix.

    Args:
        exact: [R, C], float32; not changed.
        dtype: bfloat16 or float16; other dtypes are rounded to nearest.
        name, first_row: name under which the tensor is written, and index of the first of the rows in it.

    Returns:
        [R, C] in ``dtype``; infinite where it has no number that large.
    """
    if rounding == "nearest" or dtype not in (torch.bfloat16, torch.float16) or not is_finite(exact):
        return exact.to(dtype)  # NaN and infinity stay, for the caller to find
    rounded = torch.empty_like(exact, dtype=dtype)
    columns = exact.shape[1]
    table = _thresholds(columns)
    # Groups of rows start at multiples of the table's rows in the tensor, wherever the block starts.
    start = first_row
    while start < first_row + len(exact):
        group, row = divmod(start, len(table))
        stop = min((group + 1) * len(table), first_row + len(exact))
        offset = zlib.crc32(f"{name}:{group}".encode()) % _OFFSETS
        part = slice(start - first_row, stop - first_row)
        thresholds = table[row : row + stop - start, offset : offset + columns]
        _round_up_or_down(exact[part], thresholds, rounded[part])
        start = stop
    return rounded


def _round_up_or_down(exact: Tensor, thresholds: Tensor, rounded: Tensor) -> None:
    """Write the numbers next to ``exact`` to ``rounded``; ``thresholds`` are below 2^16."""
    dtype = rounded.dtype
    if dtype == torch.bfloat16:  # the first 16 bits of a float32
        bits = torch.add(exact.view(torch.int32), thresholds).bitwise_right_shift_(16)
        rounded.view(torch.int16).copy_(bits)
        return
    # Below the smallest normal number, the numbers of float16 are as far apart as directly above it.
    smallest = torch.finfo(dtype).smallest_normal
    offset = torch.where(exact.abs() < smallest, torch.full_like(exact, smallest).copysign_(exact), 0.0)
    bits = (exact + offset).view(torch.int32)
    numbers = (thresholds >> 3).add_(bits).bitwise_and_(-1 << 13).view(torch.float32)
    rounded.copy_(numbers.sub_(offset).copysign_(exact))  # zero keeps its sign


@lru_cache(maxsize=2)
def _thresholds(columns: int) -> Tensor:
    """Return integers below 2^16 for a group of rows, each spread evenly along the row from a random start.

    Returns:
        [rows, columns + 1024]: any ``columns`` neighbours of a row are such a sequence. At most 8 MiB for up to 1,024
        columns, of which a bias or a norm, whose elements are rows, has one.
    """
    shifts = _mixed(torch.arange(max(1, _GROUP // max(columns, _OFFSETS))))
    steps = torch.arange(columns + _OFFSETS) * _GOLDEN
    return ((shifts & 0xFFFF).to(torch.int32)[:, None] + (steps & 0xFFFF).to(torch.int32)).bitwise_and_(0xFFFF)


def _mixed(keys: Tensor) -> Tensor:
    """Hash 64-bit integers: the finaliser of SplitMix64, https://prng.di.unimi.it/splitmix64.c."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        keys = (keys ^ (keys >> shift)) * factor
    return keys ^ (keys >> 31)
