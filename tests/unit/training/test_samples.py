"""--keep_samples: which training samples a run leaves beside its result, and where they must not be."""

from __future__ import annotations

from pathlib import Path

import pytest

import merge_lora
from checkpoints.training_samples import TrainingSamples
from data_utils.encode import EncodeOptions, Encoder
from data_utils.examples import ExampleSet
from loading.checkpoint import load_checkpoint
from tests.commands import finetune_here, names_in, run_here
from tests.data import load
from tests.models import CONVERSATIONS, TINY, copy_checkpoint, write_conversations
from training.samples import MAX_TOKENS, choose_samples

NAME = "training_samples.json"
LONG = [("user", "word " * 600), ("assistant", "Too long to be kept.")]


def encode(path: Path, count: int) -> ExampleSet:
    """Encode ``count`` conversations with different answers; every third is long, and the first is there twice."""
    records = [LONG if n % 3 == 0 else [("user", f"Say {n}."), ("assistant", f"{n}!")] for n in range(1, count + 1)]
    data = write_conversations(path, [records[0], *records])
    checkpoint = load_checkpoint(str(TINY))
    return load(Encoder(checkpoint.tokenizer, checkpoint.family, EncodeOptions(max_length=2048)), data)


def test_samples_are_different_whole_short_and_from_all_parts_of_the_set(tmp_path: Path) -> None:
    examples = encode(tmp_path / "data.json", 80)
    by_place = {examples.where(index): example for index, example in enumerate(examples)}
    places = [*by_place]
    samples = choose_samples(examples, 8, seed=1).samples
    for part, sample in enumerate(samples):
        example = by_place[sample.source]
        assert (sample.ids, sample.labels) == (example["input_ids"], example["labels"])
        assert len(sample.ids) <= MAX_TOKENS and any(label >= 0 for label in sample.labels[1:])
        assert abs(places.index(sample.source) - 80 * (part + 0.5) / 8) < 12
    assert len({tuple(sample.ids) for sample in samples}) == len(samples) == 8


def test_the_choice_depends_on_the_seed_alone(tmp_path: Path) -> None:
    examples = encode(tmp_path / "data.json", 80)
    assert choose_samples(examples, 8, seed=1) == choose_samples(encode(tmp_path / "data.json", 80), 8, seed=1)
    assert choose_samples(examples, 8, seed=1) != choose_samples(examples, 8, seed=2)


@pytest.mark.parametrize(("count", "kept"), [(1, 1), (5, 4), (2, 2)])
def test_copies_and_long_samples_are_left_out(tmp_path: Path, count: int, kept: int) -> None:
    examples = encode(tmp_path / "data.json", count)
    assert len(choose_samples(examples, 8, seed=1).samples) == kept


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train for two steps with a checkpoint after each, and resume from the first."""
    folder = tmp_path_factory.mktemp("run")
    train(folder)
    return folder / "out"


def train(folder: Path, *flags: object) -> None:
    data = write_conversations(folder / "data.json", CONVERSATIONS)
    finetune_here(
        "--model_name_or_path", TINY, "--data_path", data, "--output_dir", folder / "out", "--use_lora",
        "--max_steps", 2, "--save_steps", 1, *flags,
    )  # fmt: skip


def test_a_run_keeps_them_beside_its_result_alone(run: Path) -> None:
    examples = {tuple(example["input_ids"]): example for example in encode_all(run)}
    samples = TrainingSamples.read(run).samples
    assert len(samples) == 8
    assert all(sample.labels == examples[tuple(sample.ids)]["labels"] for sample in samples)
    assert NAME not in names_in(run / "checkpoint-1")
    assert TrainingSamples.read(run / "checkpoint-1").samples == samples


def encode_all(run: Path) -> ExampleSet:
    checkpoint = load_checkpoint(str(TINY))
    return load(
        Encoder(checkpoint.tokenizer, checkpoint.family, EncodeOptions(max_length=2048)), run.parent / "data.json"
    )


def test_a_merged_folder_has_none(run: Path, tmp_path: Path) -> None:
    base = copy_checkpoint(tmp_path / "base")
    TrainingSamples.read(run).write(base)  # the result of a run on all parameters has them, too
    words = ["--adapter", run, "--base", base, "--output", tmp_path / "merged"]
    assert run_here(merge_lora.main, "merge_lora.py", words) == 0
    assert NAME not in names_in(tmp_path / "merged")


def test_a_resumed_run_keeps_the_same_or_removes_them(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = (run / NAME).read_bytes()
    train(run.parent, "--resume_from_checkpoint", run / "checkpoint-1")
    assert (run / NAME).read_bytes() == before
    assert f"{NAME} contains 8 of your conversations; --keep_samples 0 leaves it out" in capfd.readouterr().err
    train(run.parent, "--resume_from_checkpoint", run / "checkpoint-1", "--keep_samples", 0)
    assert NAME not in names_in(run)
    assert NAME not in capfd.readouterr().err
