"""The share of padding in the batches of each batching strategy, for samples of different lengths.

A share is padding / (padding + tokens) of one epoch. Lengths are given as counts (``{length: samples}``), so memory
does not grow with the data.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

STRATEGIES = {
    "fixed": "all padded to --model_max_length",
    "dynamic": "random batches padded to their longest sample",
    "grouped": "batches of samples of similar length",
    "rows": "the samples of a batch in one row",
}
# The share of grouped batches depends on the shuffle, so it is simulated with this many samples.
_SIMULATED_SAMPLES = 65_536
# transformers sorts by length within this many batches.
_MEGABATCH = 50


def padding_shares(
    lengths: Mapping[int, int], max_length: int, batch_size: int = 1, accumulation: int = 1
) -> dict[str, float]:
    """Return the share of padding of each of ``STRATEGIES``; empty without samples.

    ``fixed`` pads every sample to ``max_length``; ``dynamic`` pads random batches to their longest sample; ``grouped``
    does so after sorting by length like transformers' ``group_by_length``; ``rows`` pads nothing.

    Args:
        lengths: number of samples of each length.
        max_length: ``model_max_length``; a longer sample replaces it.
        batch_size: samples of a batch on one device.
        accumulation: batches of an optimizer step, which are grouped together.
    """
    lengths = {length: lengths[length] for length in sorted(lengths) if length > 0 and lengths[length] > 0}
    if not lengths:
        return {}
    tokens = sum(length * count for length, count in lengths.items())
    shares = {
        "fixed": 1 - tokens / (sum(lengths.values()) * max(max_length, *lengths)),
        "dynamic": 1 - tokens / _dynamic_positions(lengths, batch_size),
        "grouped": _grouped_share(_shuffled(lengths), batch_size, batch_size * accumulation),
        "rows": 0.0,
    }
    return {strategy: max(0.0, share) for strategy, share in shares.items()}


def _dynamic_positions(lengths: Mapping[int, int], batch_size: int) -> float:
    """Return the expected number of positions in an epoch of random batches; exact, without simulation."""
    batches, rest = divmod(sum(lengths.values()), batch_size)
    positions = batches * batch_size * _expected_longest(lengths, batch_size) if batches else 0.0
    return positions + (rest * _expected_longest(lengths, rest) if rest else 0.0)


def _expected_longest(lengths: Mapping[int, int], drawn: int) -> float:
    """Return the expected longest of samples drawn without replacement: the sum over v of v * P(longest is v)."""
    values = np.fromiter(lengths, np.float64)
    cumulated = np.cumsum(np.fromiter(lengths.values(), np.float64))
    none_longer = np.ones_like(cumulated)
    for already_drawn in range(drawn):
        none_longer *= np.maximum(cumulated - already_drawn, 0) / (cumulated[-1] - already_drawn)
    return float(values @ np.diff(none_longer, prepend=0.0))


def _shuffled(lengths: Mapping[int, int]) -> npt.NDArray[np.int64]:
    """Return the samples' lengths in a random but reproducible order; at most ``_SIMULATED_SAMPLES`` of them."""
    random = np.random.default_rng(0)
    values, counts = np.fromiter(lengths, np.int64), np.fromiter(lengths.values(), np.int64)
    total = int(counts.sum())
    if total <= _SIMULATED_SAMPLES:
        return random.permutation(np.repeat(values, counts))
    drawn = random.integers(0, total, _SIMULATED_SAMPLES)
    return values[np.searchsorted(np.cumsum(counts), drawn, side="right")]


def _grouped_share(shuffled: npt.NDArray[np.int64], batch_size: int, group_size: int) -> float:
    """Return the share of padding in batches cut from megabatches that are sorted by length.

    Args:
        group_size: the batch size that transformers passes to its sampler.
    """
    size = group_size * max(1, min(len(shuffled) // (group_size * 4), _MEGABATCH))
    megabatches = (shuffled[start : start + size] for start in range(0, len(shuffled), size))
    ordered = np.concatenate([np.sort(megabatch)[::-1] for megabatch in megabatches])
    starts = np.arange(0, len(ordered), batch_size)
    samples = np.diff(starts, append=len(ordered))
    return 1 - float(ordered.sum()) / float(np.maximum.reduceat(ordered, starts) @ samples)
