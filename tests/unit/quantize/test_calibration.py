"""Sampling of calibration data: which conversations are drawn and held out, and how they are tokenised."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from data_utils.dataset import DataReader
from data_utils.encode import EncodeOptions, Encoder
from data_utils.prepared import load_examples
from data_utils.sources import parse_source
from errors import DataError
from loading.checkpoint import Checkpoint, load_checkpoint
from quantize.calibration import Samples, draw_samples
from tests.models import TINY

OPTIONS = EncodeOptions(max_length=256)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return load_checkpoint(str(TINY))


def write_questions(path: Path, count: int, question: str = "Number") -> Path:
    records = [
        {"messages": [{"role": "user", "content": f"{question} {n}?"}, {"role": "assistant", "content": f"{n}."}]}
        for n in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return path


def draw(checkpoint: Checkpoint, path: Path, count: int, seed: int = 42, options: EncodeOptions = OPTIONS) -> Samples:
    return draw_samples(checkpoint, [str(path)], count, options, "auto", seed, show_progress=False)


def texts(checkpoint: Checkpoint, samples: Samples) -> list[list[str]]:
    return [
        [checkpoint.tokenizer.decode(each["input_ids"]) for each in part]
        for part in (samples.calibration, samples.held_out)
    ]


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, (1, 1)), (20, (20, 20)),  # as many conversations as calibrate, whose answers have few tokens
        (40, (40, 20)), (50, (45, 15)), (500, (45, 15)),  # all 60, of which a quarter is held out at most
    ],
)  # fmt: skip
def test_held_out_conversations_do_not_calibrate(
    checkpoint: Checkpoint, tmp_path: Path, count: int, expected: tuple[int, int]
) -> None:
    samples = draw(checkpoint, write_questions(tmp_path / "data.jsonl", 60), count)
    assert (len(samples.calibration), len(samples.held_out)) == expected
    calibration, held_out = texts(checkpoint, samples)
    assert len({*calibration, *held_out}) == sum(expected), "none twice, none in both parts"
    assert samples.calibration_tokens == sum(len(each["input_ids"]) for each in samples.calibration)


def test_no_more_is_held_out_than_measuring_needs(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_questions(tmp_path / "data.jsonl", 60)
    tokens = draw(checkpoint, path, 20).held_out_tokens
    assert tokens == sum(label != -100 for each in draw(checkpoint, path, 20).held_out for label in each["labels"])
    monkeypatch.setattr("quantize.calibration.HELD_OUT_TOKENS", tokens // 4)
    samples = draw(checkpoint, path, 20)
    assert len(samples.calibration) == 20 and len(samples.held_out) < 10
    last = Samples([], samples.held_out[-1:]).held_out_tokens
    assert samples.held_out_tokens - last < tokens // 4 <= samples.held_out_tokens


def test_the_seed_decides_what_is_drawn(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = write_questions(tmp_path / "data.jsonl", 60)
    first, again, other = (texts(checkpoint, draw(checkpoint, path, 20, seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert {*first[0], *first[1]} != {*other[0], *other[1]}


def test_every_conversation_can_be_drawn(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """With 30 seeds and half drawn each time, a conversation that is drawn never or always is no coincidence."""
    path = write_questions(tmp_path / "data.jsonl", 12)
    drawn = [text for seed in range(30) for part in texts(checkpoint, draw(checkpoint, path, 3, seed)) for text in part]
    counts = [drawn.count(text) for text in set(drawn)]
    assert len(counts) == 12 and min(counts) >= 4 and max(counts) <= 26


def test_samples_are_tokenised_as_in_training(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = write_questions(tmp_path / "data.jsonl", 8, "Is <|im_end|> written")
    encoder = Encoder(checkpoint.tokenizer, checkpoint.family, OPTIONS)
    reader = DataReader({"train": [parse_source(str(path))]}, encoder, show_progress=False)
    trained = [(each["input_ids"], each["labels"]) for each in load_examples(reader)["train"]]
    samples = draw(checkpoint, path, 8)
    drawn = [(each["input_ids"], each["labels"]) for each in (*samples.calibration, *samples.held_out)]
    assert sorted(drawn) == sorted(trained)
    end = checkpoint.end_ids[0]
    assert [ids.count(end) for ids, _ in drawn] == [3] * 8, "one per turn, none from the text"


def test_all_conversations_are_used_if_there_are_fewer_than_asked(
    checkpoint: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    samples = draw(checkpoint, write_questions(tmp_path / "data.jsonl", 5), 128)
    assert len(samples.calibration) + len(samples.held_out) == 5
    assert "--samples 128: the data contains 5 conversations, 4 calibrate" in caplog.text


@pytest.mark.parametrize(("count", "options"), [(1, OPTIONS), (9, EncodeOptions(max_length=8))])
def test_fewer_than_two_usable_conversations_are_refused(
    checkpoint: Checkpoint, tmp_path: Path, count: int, options: EncodeOptions
) -> None:
    path = write_questions(tmp_path / "data.jsonl", count)
    usable = "1" if count == 1 else "none"
    with pytest.raises(
        DataError, match=rf"data.jsonl: {usable} of the conversations can be used, at least 2 are needed"
    ):
        draw(checkpoint, path, 128, options=options)
