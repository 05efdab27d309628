"""Checkpoints and files appear complete or not at all."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from errors import Terminated
from tests.commands import limited_file_size, names_in
from training.run_folder.names import STAGING
from training.run_folder.staging import exchange_folders, staged_checkpoint, staged_files


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


# --------------------------------------------------------------------------------------------- killed at a system call


class Killed(BaseException):
    """The process ends here."""


TOKENIZER = ("generation_config.json", "tokenizer_config.json", "additional_chat_templates/tool.jinja")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", *TOKENIZER)
FULL = ("config.json", "model.safetensors", *TOKENIZER)
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json")
SHARDED = ("config.json", *SHARDS, *TOKENIZER)
SAVED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "a first adapter": ((), ADAPTER),
    "another adapter": (ADAPTER, ADAPTER),
    "a first model": ((), SHARDED),
    "another model": (FULL, FULL),
    "more shards": (FULL, SHARDED),
    "fewer shards": (SHARDED, FULL),
    "other shards": (SHARDED, SHARDED),
}


def write(folder: Path, names: tuple[str, ...], text: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def content_of(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and STAGING not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def die_at(patch: pytest.MonkeyPatch, call: int) -> None:
    """Let the process end at a system call that changes a name in the final folder."""
    left = itertools.count(call, -1)

    def limited(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if next(left) <= 0:
                raise Killed
            return function(*args, **kwargs)

        return run

    patch.setattr(os, "replace", limited(os.replace))
    patch.setattr(Path, "unlink", limited(Path.unlink))
    patch.setattr("training.run_folder.staging.exchange_folders", limited(exchange_folders))


@pytest.mark.parametrize("case", SAVED)
def test_a_killed_process_leaves_a_complete_model_or_none(tmp_path: Path, case: str) -> None:
    """At every moment: a folder that a loader takes for a model has all of its files, and weights of one version."""
    before, after = SAVED[case]
    for call in itertools.count():
        folder = tmp_path / str(call)
        folder.mkdir()
        write(folder, before, "old")
        killed = False
        try:
            with pytest.MonkeyPatch.context() as patch, staged_files(folder) as staged:
                write(staged, after, "new")
                die_at(patch, call)
        except Killed:
            killed = True
        content = content_of(folder)
        if not killed:
            assert content == dict.fromkeys(after, "new")
            break
        if {"config.json", "adapter_config.json"} & content.keys():
            assert content.keys() in (set(before), set(after))
            weights = {text for name, text in content.items() if "model" in name}
            assert len(weights) == 1
        elif before in (ADAPTER, FULL) and before == after:
            raise AssertionError("one file of weights is replaced without a moment in which there is no model")
    assert call > 4


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_checkpoint_is_replaced_in_one_step_where_the_system_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    if not can_exchange:
        monkeypatch.setattr("training.run_folder.staging.exchange_folders", lambda first, second: False)
    for call in itertools.count():
        final = tmp_path / str(call) / "checkpoint-2"
        final.mkdir(parents=True)
        fill(final, "old")
        killed = False
        try:
            with pytest.MonkeyPatch.context() as patch, staged_checkpoint(final) as staged:
                fill(staged, "new")
                die_at(patch, call)
        except Killed:
            killed = True
        if can_exchange or not killed:
            assert set(content_of(final).values()) in ([{"old"}, {"new"}] if killed else [{"new"}])
        if not killed:
            break
    assert names_in(tmp_path / str(call)) == ["checkpoint-2"]


def test_a_process_that_dies_while_it_removes_checkpoints_leaves_no_part_of_one(tmp_path: Path) -> None:
    superseded = [tmp_path / f"checkpoint-{step}" for step in (2, 4)]
    for folder in superseded:
        fill(folder, "old")
    if (child := os.fork()) == 0:

        def die_halfway(path: str, **options: Any) -> None:
            (Path(path) / "model.safetensors").unlink()
            os._exit(9)

        with staged_checkpoint(tmp_path / "checkpoint-6", superseded=lambda: superseded) as staged:
            fill(staged, "new")
            shutil.rmtree = die_halfway  # type: ignore[assignment]
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert names_in(tmp_path) == [STAGING, "checkpoint-6"]
    assert set(content_of(tmp_path).values()) == {"new"}
    with staged_files(tmp_path) as staged:  # also if no step is left
        (staged / "config.json").write_text("new")
    assert names_in(tmp_path) == ["checkpoint-6", "config.json"]


def test_superseded_checkpoints_stay_until_the_new_one_is_complete(tmp_path: Path) -> None:
    old = tmp_path / "checkpoint-2"
    fill(old, "old")
    with pytest.raises(Terminated), staged_checkpoint(tmp_path / "checkpoint-4", superseded=lambda: [old]):
        raise Terminated
    assert set(content_of(tmp_path).values()) == {"old"}
    with staged_checkpoint(tmp_path / "checkpoint-4", superseded=lambda: [old]) as staged:
        fill(staged, "new")
    assert names_in(tmp_path) == ["checkpoint-4"]
