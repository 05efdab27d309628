"""Output folders: which ones are free, and folders written in one step."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from checkpoints.folders import check_output_folder, staged_folder, temporary_folder
from errors import ConfigError
from tests.golden import REPO
from tests.tensors import files


@pytest.mark.parametrize("state", ["absent", "empty", "parent absent"])
def test_staged_folder_appears_when_it_is_complete(tmp_path: Path, state: str) -> None:
    final = tmp_path / "new" / "out" if state == "parent absent" else tmp_path / "out"
    if state == "empty":
        final.mkdir()
    with staged_folder(final) as folder:
        assert folder == final.parent / f"out.partial-{os.getpid()}"
        (folder / "file").write_text("complete")
        assert not (final / "file").exists()
    assert (final / "file").read_text() == "complete"
    assert files(final.parent) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failure_removes_the_staged_folder(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), staged_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("half")
        raise error
    assert files(tmp_path) == []


def test_leftover_with_the_same_process_id_is_replaced(tmp_path: Path) -> None:
    leftover = tmp_path / f"out.partial-{os.getpid()}"
    leftover.mkdir()
    (leftover / "old").touch()
    with staged_folder(tmp_path / "out") as folder:
        (folder / "file").touch()
    assert files(tmp_path / "out") == ["file"]


def test_only_leftovers_of_dead_processes_are_removed(tmp_path: Path) -> None:
    dead = tmp_path / "out.partial-1"
    dead.mkdir()
    (dead / "half.safetensors").touch()
    alike = tmp_path / "out.partial.mine"
    alike.mkdir()
    with staged_folder(tmp_path / "out") as first:
        with pytest.raises(RuntimeError), staged_folder_of_another_process(tmp_path / "out"):
            assert first.is_dir() and not dead.exists()
            raise RuntimeError
        (first / "file").touch()
    assert files(tmp_path) == ["out", "out.partial.mine"]


@contextmanager
def staged_folder_of_another_process(path: Path) -> Iterator[None]:
    code = "import sys; from checkpoints.folders import staged_folder\nwith staged_folder(sys.argv[1]): input()"
    with subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=REPO, stdin=subprocess.PIPE) as process:
        other = path.with_name(f"{path.name}.partial-{process.pid}")
        while not other.is_dir():
            assert process.poll() is None
            time.sleep(0.01)
        yield
        assert other.is_dir()
    assert not other.exists(), "the process ends with its standard input and removes its folder"


def test_symbolic_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for name in ("link", "dangling"):
        with pytest.raises(ConfigError, match=rf"{name} is a symbolic link"):
            check_output_folder(tmp_path / name)


def test_output_folder_that_is_not_free_is_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("keep")
    (tmp_path / "file").write_text("keep")
    for check in (check_output_folder, lambda path, flag: staged_folder(path, flag).__enter__()):
        with pytest.raises(ConfigError, match=r"^--output_dir .*full is not empty"):
            check(tmp_path / "full", "--output_dir")
        with pytest.raises(ConfigError, match=r"^--output_dir .*file is a file"):
            check(tmp_path / "file", "--output_dir")
    with pytest.raises(ConfigError, match=r"cannot be created: Not a directory"):
        staged_folder(tmp_path / "file" / "out").__enter__()
    assert files(tmp_path) == ["file", "full"]


def test_result_is_kept_if_the_output_folder_is_taken_meanwhile(tmp_path: Path) -> None:
    message = r"cannot be replaced by the result.* result is in .*out\.partial-\d+"
    with pytest.raises(ConfigError, match=message), staged_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("complete")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "other").touch()
    assert (folder / "file").read_text() == "complete"


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_temporary_folder_starts_empty_and_is_removed(tmp_path: Path, error: type[BaseException] | None) -> None:
    path = tmp_path / "new" / ".saving"
    path.mkdir(parents=True)
    (path / "left").touch()
    with suppress(RuntimeError, KeyboardInterrupt), temporary_folder(path) as folder:
        assert folder == path and files(folder) == []
        (folder / "moved").touch()
        (folder / "rest").touch()
        (folder / "moved").rename(tmp_path / "moved")
        if error is not None:
            raise error
    assert files(tmp_path) == ["moved", "new"] and files(tmp_path / "new") == []
