"""Checkpoints and files appear complete or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from errors import Terminated
from tests.commands import limited_file_size, names_in
from training.run_folder.staging import staged_checkpoint, staged_files


def fill(folder: Path, text: str) -> None:
    folder.mkdir(exist_ok=True)
    for name in ("model.safetensors", "trainer_state.json"):
        (folder / name).write_text(text)


def test_a_checkpoint_appears_when_it_is_complete(tmp_path: Path) -> None:
    final = tmp_path / "checkpoint-2"
    for text in ("first", "second"):
        with staged_checkpoint(final) as staged:
            assert staged.name == "checkpoint-2"
            fill(staged, text)
            assert not final.exists() or (final / "model.safetensors").read_text() == "first"
        assert {path.read_text() for path in final.iterdir()} == {text}
        assert names_in(tmp_path) == ["checkpoint-2"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), Terminated()])
def test_a_failed_checkpoint_leaves_the_earlier_ones(tmp_path: Path, error: BaseException) -> None:
    for step in (2, 4):
        with staged_checkpoint(tmp_path / f"checkpoint-{step}") as staged:
            fill(staged, "complete")
    for step in (4, 6):
        with pytest.raises(type(error)), staged_checkpoint(tmp_path / f"checkpoint-{step}") as staged:
            fill(staged, "partial")
            raise error
    assert names_in(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    assert {path.read_text() for path in tmp_path.rglob("*.*") if path.is_file()} == {"complete"}


def test_a_rank_that_is_not_the_writer_moves_nothing(tmp_path: Path) -> None:
    with staged_checkpoint(tmp_path / "checkpoint-2", is_writer=False) as staged:
        staged.mkdir(parents=True)
    assert staged.is_dir()
    assert names_in(tmp_path) == [".saving"]


def test_staged_files_are_moved_together(tmp_path: Path) -> None:
    fill(tmp_path, "old")
    with pytest.raises(OSError), limited_file_size(100), staged_files(tmp_path) as staging:
        fill(staging, "new")
        (staging / "config.json").write_text("x" * 101)
    assert {path.read_text() for path in tmp_path.iterdir()} == {"old"}
    with staged_files(tmp_path) as staging:
        fill(staging, "new")
    assert {path.read_text() for path in tmp_path.iterdir()} == {"new"}
