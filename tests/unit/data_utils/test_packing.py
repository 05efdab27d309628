"""Packs: complete, never too large, well filled, and the same for the same lengths."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chat.families import QWEN_V1
from data_utils.encode import EncodeOptions, Encoder
from data_utils.packing import Packs, count_packs, pack
from qwen_model.tokenization_qwen import QWenTokenizer
from tests.data import reader
from tests.golden import Golden


def contents(packs: Packs) -> list[list[int]]:
    return [packs.samples[start:end].tolist() for start, end in pairwise(packs.starts.tolist())]


def best_fit_decreasing(lengths: list[int], capacity: int) -> int:
    """Pack sample by sample, and return the number of packs."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        room = min((room for room in rooms if room >= length), default=None)
        if room is None:
            room = capacity
            rooms.append(room)
        rooms[rooms.index(room)] -= length
    return len(rooms)


@given(st.integers(1, 40).flatmap(lambda most: st.tuples(st.just(most), st.lists(st.integers(1, most)))))
def test_every_sample_is_in_one_pack_and_no_pack_is_too_large(drawn: tuple[int, list[int]]) -> None:
    capacity, lengths = drawn
    packs = contents(pack(lengths, capacity))
    assert sorted(index for indices in packs for index in indices) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in indices) <= capacity for indices in packs)
    assert [indices[0] for indices in packs] == sorted(indices[0] for indices in packs)
    assert len(packs) == best_fit_decreasing(lengths, capacity) == count_packs(Counter(lengths), capacity)


def test_packs_depend_on_lengths_alone_and_copies_may_share_one() -> None:
    lengths = np.random.default_rng(1).integers(1, 60, 500).tolist()
    assert contents(pack(lengths, 64)) == contents(pack(np.array(lengths), 64))
    assert contents(pack([20, 20, 20, 64], 64)) == [[0, 1, 2], [3]]


def test_large_sets_are_packed_by_few_placings() -> None:
    """Samples of one length are placed at once: 200,000 take a tenth of a second."""
    lengths = np.minimum(np.random.default_rng(0).lognormal(5.3, 0.9, 200_000).astype(int) + 1, 2048)
    packs = pack(lengths, 2048)
    assert lengths.sum() / (2048 * (len(packs.starts) - 1)) > 0.999


def test_real_conversations_fill_their_packs(shared: Path) -> None:
    tokenizer = QWenTokenizer.from_pretrained(Golden("large", shared / "golden").tiny)
    encoder = Encoder(tokenizer, QWEN_V1, EncodeOptions(max_length=2048))
    paths = sorted((shared / "corpora").glob("*.json"))
    lengths = [len(kept.encoded.input_ids) for kept in reader(encoder, *paths).read() for _ in range(kept.copies)]
    packs = count_packs(Counter(lengths), 2048)
    assert len(lengths) > 2000 and sum(lengths) / (2048 * packs) >= 0.98


@pytest.mark.parametrize("lengths", [[], [5]])
def test_few_samples(lengths: list[int]) -> None:
    packs = pack(lengths, 5)
    assert contents(packs) == [[0]] * len(lengths) and count_packs(Counter(lengths), 5) == len(lengths)
