"""training_samples.json: what was written is read, also for a checkpoint of the run; faulty files are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from checkpoints.training_samples import TrainingSample, TrainingSamples
from errors import ConfigError
from tests.commands import names_in

SAMPLES = TrainingSamples(
    [TrainingSample("data.jsonl:3", [5, 6, 7], [-100, 6, -100]), TrainingSample("ü", [1], [-100])]
)


def test_samples_are_read_as_they_were_written(tmp_path: Path) -> None:
    SAMPLES.write(tmp_path)
    assert TrainingSamples.read(tmp_path) == SAMPLES
    content = json.loads((tmp_path / "training_samples.json").read_text())
    assert content["version"] == 1
    assert content["samples"][0] == {"source": "data.jsonl:3", "ids": [5, 6, 7], "labels": [-100, 6, -100]}


def test_a_checkpoint_has_those_of_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SAMPLES.write(tmp_path)
    for name in ("checkpoint-20", "merged"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "checkpoint-20")
    assert TrainingSamples.read(Path()) == TrainingSamples.read(tmp_path / "checkpoint-20") == SAMPLES
    assert TrainingSamples.read(tmp_path / "merged") == TrainingSamples()


def test_no_samples_remove_the_file(tmp_path: Path) -> None:
    for _ in range(2):
        SAMPLES.write(tmp_path)
        TrainingSamples().write(tmp_path)
        assert names_in(tmp_path) == []
    assert TrainingSamples.read(tmp_path) == TrainingSamples()


GOOD = {"source": "a", "ids": [1, 2], "labels": [-100, 2]}


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ({"samples": []}, "version is missing"),
        ({"version": 2, "samples": []}, "version is 2, not 1"),
        ({"version": 1, "samples": [{**GOOD, "labels": [2]}]}, "labels has 1 entries, ids has 2"),
        ({"version": 1, "samples": [{**GOOD, "ids": [1, -2]}]}, "samples[0].ids[1]"),
        ({"version": 1, "samples": [{**GOOD, "ids": [1, True]}]}, "samples[0].ids[1]"),
        ({"version": 1, "samples": [{**GOOD, "labels": None}]}, "samples[0].labels"),
        ({"version": 1, "samples": [GOOD] * 1001}, "samples"),
    ],
)
def test_a_faulty_file_is_refused(tmp_path: Path, content: dict[str, Any], fault: str) -> None:
    (tmp_path / "training_samples.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError) as error:
        TrainingSamples.read(tmp_path)
    assert fault in str(error.value) and str(tmp_path / "training_samples.json") in str(error.value)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    SAMPLES.write(tmp_path)
    (tmp_path / "run" / "training_samples.json").symlink_to(tmp_path / "training_samples.json")
    with pytest.raises(ConfigError, match="leads out of its folder"):
        TrainingSamples.read(tmp_path / "run")
