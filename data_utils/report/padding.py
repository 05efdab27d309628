"""How much of what is computed is padding, for each way to make batches of samples of different lengths.

A share is padding / (padding + tokens) of one epoch. Lengths come as counts (``{length: samples}``), so nothing here
grows with the data.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

# Grouping depends on the shuffle, so it is tried out, on this many samples.
_DRAWN = 65_536
# transformers sorts by length within this many batches.
_MEGABATCH = 50


def padding_shares(
    lengths: Mapping[int, int], row: int, batch_size: int = 1, accumulation: int = 1
) -> dict[str, float]:
    """The share of padding in ``fixed``, ``dynamic``, ``grouped`` and ``packed`` batches, in this order.

    ``fixed`` pads every sample to ``row``; ``dynamic`` pads random batches to their longest sample; ``grouped`` does so
    after sorting by length, as transformers' ``group_by_length``; ``packed`` joins samples in rows of ``row`` tokens.

    Args:
        lengths: samples of each length.
        row: ``model_max_length``; a longer sample makes it longer.
        batch_size: samples of a batch on one device.
        accumulation: batches of an optimizer step; the grouping works on all of them together.
    """
    lengths = {length: lengths[length] for length in sorted(lengths) if length > 0 and lengths[length] > 0}
    if not lengths:
        return {}
    tokens = sum(length * count for length, count in lengths.items())
    row = max(row, *lengths)
    computed = {
        "fixed": sum(lengths.values()) * row,
        "dynamic": _dynamic(lengths, batch_size),
        "packed": packed_rows(lengths, row) * row,
    }
    shares = {name: 1 - tokens / positions for name, positions in computed.items()}
    shares["grouped"] = _grouped_share(_draw(lengths), batch_size, batch_size * accumulation)
    return {name: max(0.0, shares[name]) for name in ("fixed", "dynamic", "grouped", "packed")}


def _dynamic(lengths: Mapping[int, int], batch_size: int) -> float:
    """Expected positions of an epoch of random batches: exact, without drawing any."""
    whole, rest = divmod(sum(lengths.values()), batch_size)
    positions = whole * batch_size * _expected_longest(lengths, batch_size) if whole else 0.0
    return positions + (rest * _expected_longest(lengths, rest) if rest else 0.0)


def _expected_longest(lengths: Mapping[int, int], drawn: int) -> float:
    """The expected longest of ``drawn`` samples without putting back: the sum over v of v * P(longest is v)."""
    values = np.fromiter(lengths, np.float64)
    up_to = np.cumsum(np.fromiter(lengths.values(), np.float64))
    none_longer = np.ones_like(up_to)
    for already in range(drawn):
        none_longer *= np.maximum(up_to - already, 0) / (up_to[-1] - already)
    return float(values @ np.diff(none_longer, prepend=0.0))


def _draw(lengths: Mapping[int, int]) -> npt.NDArray[np.int64]:
    """The lengths in a random order, always the same one; at most ``_DRAWN`` of them."""
    random = np.random.default_rng(0)
    values, counts = np.fromiter(lengths, np.int64), np.fromiter(lengths.values(), np.int64)
    total = int(counts.sum())
    if total <= _DRAWN:
        return random.permutation(np.repeat(values, counts))
    places = random.integers(0, total, _DRAWN)
    return values[np.searchsorted(np.cumsum(counts), places, side="right")]


def _grouped_share(drawn: npt.NDArray[np.int64], batch_size: int, group: int) -> float:
    """Padding of batches cut from megabatches sorted by length; ``group`` is what the sampler calls a batch."""
    size = group * max(1, min(len(drawn) // (group * 4), _MEGABATCH))
    ordered = np.concatenate([np.sort(drawn[start : start + size])[::-1] for start in range(0, len(drawn), size)])
    batches = np.arange(0, len(ordered), batch_size)
    samples = np.diff(batches, append=len(ordered))
    return 1 - float(ordered.sum()) / float(np.maximum.reduceat(ordered, batches) @ samples)


def packed_rows(lengths: Mapping[int, int], row: int) -> int:
    """Rows that best-fit-decreasing fills: the longest sample first, each into the fullest row it still fits in.

    Samples of one length go into rows of one free space together, which gives the same rows as one by one: a row that
    took a sample is fuller than before, so the next one of that length goes there as well, while it fits.
    """
    rows = 0
    free: dict[int, int] = {}  # rows by their free space
    spaces: list[int] = []  # its keys, in order

    def add(space: int, count: int) -> None:
        if not count or not space:
            return
        if space not in free:
            insort(spaces, space)
        free[space] = free.get(space, 0) + count

    for length in sorted(lengths, reverse=True):
        left = lengths[length]
        while left:
            index = bisect_left(spaces, length)
            if index == len(spaces):
                opened = math.ceil(left / (row // length))
                rows += opened
                add(row, opened)
                continue
            space = spaces.pop(index)
            count, each = free.pop(space), space // length
            full = min(count, left // each)
            left -= full * each
            add(space - each * length, full)
            if full < count and left:
                add(space - left * length, 1)
                full, left = full + 1, 0
            add(space, count - full)
    return rows
