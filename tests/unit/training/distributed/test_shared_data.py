"""Data is read once per host, and all ranks train on the same examples in the same order."""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader, RandomSampler

from chat.families import QWEN_V1
from data_utils.collate import Collator
from data_utils.encode import EncodeOptions, Encoder
from data_utils.examples import ExampleSet
from data_utils.prepared import Prepared, open_prepared, prepare_temporary
from errors import ConfigError, DataError, RunError
from qwen_model.tokenization_qwen import QWenTokenizer
from tests.data import load, reader
from tests.models import CONVERSATIONS, TINY, write_conversations
from tests.worlds import run_on_ranks
from training.distributed.agreement import check_same_data
from training.distributed.shared_data import load_shared
from training.distributed.world import World


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(QWenTokenizer.from_pretrained(TINY), QWEN_V1, EncodeOptions())


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A file of conversations, one of them with a weight."""
    path = write_conversations(tmp_path / "train.json")
    records = json.loads(path.read_text(encoding="utf-8"))
    records[1]["conversations"][1]["weight"] = 0.5
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def copies(path: Path, encoder: Encoder) -> Prepared:
    return prepare_temporary(reader(encoder, f"{path}@x2"))


def test_examples_of_another_process_are_the_same(data: Path, temporary: Path, encoder: Encoder) -> None:
    prepared = copies(data, encoder)
    examples = prepared.sets["train"]
    assert examples.is_weighted
    opened = open_prepared(prepared.folder)["train"]
    prepared.release()  # as the rank that prepared them does at once
    assert list(temporary.iterdir()) == []
    assert list(opened) == list(examples)
    assert len(opened) == 2 * len(CONVERSATIONS)
    assert opened.lengths == examples.lengths
    assert (opened.source_sizes, opened.is_weighted) == (examples.source_sizes, True)
    assert [opened.where(index) for index in range(16)] == [examples.where(index) for index in range(16)]
    assert opened.where(2) == f"{data}:1 (record 2)"
    assert opened.digest() == examples.digest()
    with pytest.raises(IndexError):
        opened[16]


def test_digest_depends_on_the_examples_only(data: Path, tmp_path: Path, encoder: Encoder) -> None:
    digest = load(encoder, data).digest()
    moved = tmp_path / "elsewhere.json"
    moved.write_bytes(data.read_bytes())
    assert load(encoder, moved).digest() == digest
    assert len(digest) == 64
    text = data.read_text()
    others = [
        text.replace("0.5", "0.25"), text.replace("Tuesday", "Monday"), json.dumps(json.loads(text)[::-1]),
        json.dumps(json.loads(text)[:-1]),
    ]  # fmt: skip
    digests = {digest, load(encoder, f"{data}@x2").digest()}
    for other in others:
        data.write_text(other)
        digests.add(load(encoder, data).digest())
    assert len(digests) == 6


def test_one_rank_per_host_reads_the_data(data: Path, encoder: Encoder, temporary: Path) -> None:
    """Two hosts with two ranks and one."""
    readers: list[int] = []

    def work(world: World) -> dict[str, ExampleSet]:
        def read() -> Prepared:
            readers.append(world.rank)
            return copies(data, encoder)

        sets = load_shared(world, read)
        check_same_data(world, sets)
        return sets

    results = run_on_ranks(3, work, ["a", "a", "b"])
    assert sorted(readers) == [0, 2]
    expected = load(encoder, f"{data}@x2")
    for sets in results:
        assert sets.keys() == {"train"}
        assert list(sets["train"]) == list(expected)
        assert sets["train"].where(3) == expected.where(3)
    assert [sets["train"].report.total().kept for sets in results] == [16, 0, 16]
    # Mapped files belong to no process.
    assert all(isinstance(sets["train"]._columns["ids"].base, np.memmap) for sets in results)
    assert list(temporary.iterdir()) == []


def test_single_process_reads_for_itself(data: Path, encoder: Encoder, temporary: Path) -> None:
    sets = load_shared(World(), lambda: copies(data, encoder))
    assert len(sets["train"]) == 16
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("bad", [0, 2])
def test_bad_record_raises_the_same_error_on_all_ranks(data: Path, encoder: Encoder, temporary: Path, bad: int) -> None:
    """Whichever host finds it; rank 0 reports it."""

    def work(world: World) -> None:
        def read() -> Prepared:
            if world.rank == bad:
                raise DataError("a.json:3", "no turns", "Remove it")
            return copies(data, encoder)

        load_shared(world, read)

    errors = run_on_ranks(3, work, ["a", "a", "b"])
    place = "" if bad == 0 else "rank 2 (b): "
    assert [str(error) for error in errors] == [f"{place}a.json:3: no turns. Remove it"] * 3
    assert all(isinstance(error, ConfigError) and error.is_shared for error in errors)
    assert list(temporary.iterdir()) == []


def test_other_failure_reaches_waiting_ranks(temporary: Path) -> None:
    def read() -> Prepared:
        raise OSError(5, "Input/output error", "a.json")

    first, second = run_on_ranks(2, lambda world: load_shared(world, read), ["a", "a"])
    assert isinstance(first, OSError)
    assert isinstance(second, RunError)
    assert str(second).startswith("rank 0 failed: [Errno 5] Input/output error: 'a.json'")


def test_host_with_different_data_is_reported(data: Path, encoder: Encoder) -> None:
    other = write_conversations(data.with_name("other.json"), CONVERSATIONS[:5])

    def work(world: World) -> None:
        check_same_data(world, {"train": load(encoder, data if world.rank < 2 else other)})

    errors = run_on_ranks(4, work, ["a", "a", "b", "b"])
    assert len({str(error) for error in errors}) == 1
    assert all(error.is_shared for error in errors)
    assert str(errors[0]).startswith("rank 2 (b): the train set of 5 examples (")
    assert ", rank 0 (a): 8 examples (" in str(errors[0])


def test_order_is_independent_of_the_number_of_workers(
    data: Path, encoder: Encoder, caplog: pytest.LogCaptureFixture
) -> None:
    """Examples of mapped files in the order of a seed, read by 0, 1 or 2 worker processes."""
    with caplog.at_level(logging.ERROR):
        examples: Any = load(encoder, data)

    def batches(workers: int) -> list[Any]:
        import torch

        sampler = RandomSampler(examples, generator=torch.Generator().manual_seed(7))
        loader: DataLoader[Any] = DataLoader(
            examples, batch_size=3, sampler=sampler, num_workers=workers, collate_fn=Collator(0)
        )
        return [(batch["index"], batch["input_ids"].tolist(), batch["loss_weights"].tolist()) for batch in loader]

    alone = batches(0)
    assert sorted(index for indices, _, _ in alone for index in indices) == list(range(8))
    assert batches(1) == alone
    assert batches(2) == alone
