"""The samples that merged models are compared on: an adapter's own, else everyday conversations."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from checkpoints.adapter import Adapter
from checkpoints.fold import WeightedAdapter
from checkpoints.training_samples import TrainingSample, TrainingSamples
from export.verify.samples import MAX_TOKENS, Sample, choose_samples
from tests.verification import make_base


def adapter_with(folder: Path, *lengths: int, prompt: int = 1) -> WeightedAdapter:
    """An adapter's folder with samples of these lengths, whose ids are their own length."""
    folder.mkdir()
    samples = [TrainingSample("data.json", [n] * n, [-100] * prompt + [n] * (n - prompt)) for n in lengths]
    TrainingSamples(samples).write(folder)
    return WeightedAdapter(Adapter(folder, {}, None, {}))  # type: ignore[arg-type]


def lengths_of(*adapters: WeightedAdapter) -> list[int]:
    samples = choose_samples(adapters, Path("unused"), 768)
    assert samples.are_trained
    return [len(sample.ids) for sample in samples.items]


def test_shortest_training_samples_are_taken_from_each_adapter_in_turn(tmp_path: Path) -> None:
    first, second = adapter_with(tmp_path / "a", 40, 20, 30), adapter_with(tmp_path / "b", 25, 200)
    assert lengths_of(first) == [20, 30]
    assert lengths_of(first, second) == [20, 25]
    assert lengths_of(adapter_with(tmp_path / "c", 300)) == [MAX_TOKENS]


def test_long_prompt_is_cut_before_the_answer() -> None:
    sample = Sample(list(range(500)), [-100] * 400 + list(range(400, 500)))
    cut = sample.cut(100)
    assert cut.ids == list(range(350, 450)) and cut.labels == [-100] * 50 + list(range(400, 450))
    assert sample.cut(1000) == sample
    assert Sample(list(range(500)), [-100, *range(1, 500)]).cut(100).ids == list(range(100))


def test_ids_beyond_the_vocabulary_are_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = make_base(tmp_path / "base", "qwen2")
    beyond = adapter_with(tmp_path / "beyond", 800)
    with caplog.at_level(logging.WARNING):
        samples = choose_samples([beyond], base, 768)
    assert not samples.are_trained and "everyday conversation" in str(samples)
    assert "have ids beyond" in caplog.text
