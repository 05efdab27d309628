"""Samples packed to rows of at most ``capacity`` tokens, by best-fit decreasing over a whole set.

Each sample, the longest first, joins the pack with the least room that it fits into, or begins a new one. Samples of
one length are placed together, so the time depends on the number of different lengths more than on that of samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


class _Placing(NamedTuple):
    """``packs`` packs with ``room`` tokens left take ``samples`` samples of ``length`` tokens each.

    New packs have the whole capacity left; no other pack has.
    """

    length: int
    samples: int
    room: int
    packs: int


def count_packs(lengths: Mapping[int, int], capacity: int) -> int:
    """Return the number of packs that samples fill.

    Args:
        lengths: number of samples of each length, at most ``capacity``.
    """
    return sum(placing.packs for placing in _best_fit(lengths, capacity) if placing.room == capacity)


def _best_fit(lengths: Mapping[int, int], capacity: int) -> Iterator[_Placing]:
    """Yield what best-fit decreasing does, for equal samples and equal packs at once."""
    open_packs = [0] * capacity  # by the room that they have left
    rooms = 0  # bit r is set if there is a pack with room r; as one number, the least sufficient room is found quickly
    for length in sorted(lengths, reverse=True):
        assert 0 < length <= capacity, f"a sample of {length} tokens does not fit into {capacity}"
        left = lengths[length]
        while left:
            sufficient = rooms >> length
            room = length + (sufficient & -sufficient).bit_length() - 1 if sufficient else capacity
            # A pack that one sample has joined has the least room that suffices for the next one of this length.
            samples = min(room // length, left)
            packs = min(open_packs[room] if sufficient else left, left // samples)
            yield _Placing(length, samples, room, packs)
            left -= samples * packs
            if sufficient:
                open_packs[room] -= packs
                rooms ^= 0 if open_packs[room] else 1 << room
            if rest := room - samples * length:
                open_packs[rest] += packs
                rooms |= 1 << rest


class Packs(NamedTuple):
    """Which samples each pack contains. The packs are in the order of their first samples.

    Attributes:
        samples: the samples' indices, pack after pack, ascending in each.
        starts: of each pack in ``samples``, and the end of the last.
    """

    samples: Indices
    starts: Indices


def pack(lengths: Sequence[int] | Indices, capacity: int) -> Packs:
    """Pack samples; the same lengths give the same packs.

    Args:
        lengths: of the samples, at most ``capacity``.
    """
    values = np.asarray(lengths, dtype=np.int64)
    ordered = np.argsort(-values, kind="stable")
    by_room: list[list[int]] = [[] for _ in range(capacity)]
    pack_of = np.empty(len(values), dtype=np.int64)
    placed = count = 0
    for length, samples, room, packs in _best_fit(_count(values), capacity):
        if room == capacity:
            numbers = list(range(count, count + packs))
            count += packs
        else:
            numbers = by_room[room][-packs:]
            del by_room[room][-packs:]
        end = placed + samples * packs
        pack_of[ordered[placed:end]] = np.repeat(numbers, samples)
        placed = end
        by_room[room - samples * length] += numbers
    _, firsts = np.unique(pack_of, return_index=True)
    in_order = np.argsort(np.argsort(firsts))[pack_of]
    sizes = np.bincount(in_order, minlength=count)
    return Packs(np.argsort(in_order, kind="stable"), np.concatenate(([0], np.cumsum(sizes))))


def _count(lengths: Indices) -> dict[int, int]:
    values, counts = np.unique(lengths, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))
