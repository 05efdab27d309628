"""How much of what is computed is padding, for each way to make batches of samples of different lengths.

A share is padding / (padding + tokens) of one epoch. Lengths come as counts (``{length: samples}``), so nothing here
grows with the data.
"""

from __future__ import annotations

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
    """The share of padding in ``fixed``, ``dynamic`` and ``grouped`` batches, in this order.

    ``fixed`` pads every sample to ``row``; ``dynamic`` pads random batches to their longest sample; ``grouped`` does so
    after sorting by length, as transformers' ``group_by_length``.

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
    shares = {
        "fixed": 1 - tokens / (sum(lengths.values()) * row),
        "dynamic": 1 - tokens / _dynamic(lengths, batch_size),
        "grouped": _grouped_share(_draw(lengths), batch_size, batch_size * accumulation),
    }
    return {strategy: max(0.0, share) for strategy, share in shares.items()}


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
