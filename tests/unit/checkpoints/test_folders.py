"""Output folders: which ones are free, and folders written in one step."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from checkpoints.folders import staged_folder, temporary_folder
from errors import ConfigError
from outputs import check_output_folder
from ownership import MARK
from tests.golden import REPO
from tests.tensors import files


@pytest.mark.parametrize("state", ["absent", "empty", "parent absent"])
def test_staged_folder_appears_when_it_is_complete(tmp_path: Path, state: str) -> None:
    final = tmp_path / "new" / "out" if state == "parent absent" else tmp_path / "out"
    (tmp_path / "plain").mkdir()
    if state == "empty":
        final.mkdir()
    with staged_folder(final) as folder:
        assert folder == final.parent / "out.partial" / "out" and files(folder) == []
        (folder / "file").write_text("complete")
        assert not (final / "file").exists()
    assert (final / "file").read_text() == "complete"
    assert final.stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "plain").rmdir()
    assert files(final.parent) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failure_removes_the_staged_folder(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), staged_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("half")
        raise error
    assert files(tmp_path) == []


def test_folders_of_users_are_never_removed(tmp_path: Path) -> None:
    names = ["out.partial", "out.partial-1", f"out.partial-{os.getpid()}", "out.partial-notes", "out.partial.mine"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine")
    with staged_folder(tmp_path / "out") as folder:
        (folder / "file").touch()
    assert files(tmp_path) == sorted([*names, "out"])
    assert {(tmp_path / name / "notes.txt").read_text() for name in names} == {"mine"}


def test_leftover_of_a_killed_process_is_removed_and_a_running_one_named(tmp_path: Path) -> None:
    with staging_process(tmp_path / "out") as process:
        with pytest.raises(ConfigError, match=rf"^--output .*out is in use by -c \(process {process.pid} on "):
            staged_folder(tmp_path / "out").__enter__()
        process.kill()
        process.wait()
        assert files(tmp_path) == ["out.partial"] and files(tmp_path / "out.partial") == [MARK, "out"]
        with staged_folder(tmp_path / "out") as folder:
            assert files(folder) == []
    assert files(tmp_path) == ["out"]


@contextmanager
def staging_process(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process that writes a file to the staged folder of ``path`` and then waits."""
    code = (
        "import sys; from checkpoints.folders import staged_folder\n"
        "with staged_folder(sys.argv[1]) as folder: (folder / 'half').touch(); print(flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stdout.readline()
        yield process


def test_process_killed_after_the_rename_leaves_exactly_the_result(tmp_path: Path) -> None:
    """The mark is beside the result, not in it, and the next process removes it."""
    with staged_folder(tmp_path / "out") as folder:
        (folder / "file").touch()
        mark = (folder.parent / MARK).read_text()
    (tmp_path / "out.partial").mkdir(mode=0o700)
    (tmp_path / "out.partial" / MARK).write_text(mark)
    assert files(tmp_path / "out") == ["file"]
    shutil.rmtree(tmp_path / "out")
    with staged_folder(tmp_path / "out") as folder:
        (folder / "file").touch()
    assert files(tmp_path) == ["out"]


def test_symbolic_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for name in ("link", "dangling"):
        with pytest.raises(ConfigError, match=rf"{name} is a symbolic link"):
            check_output_folder(tmp_path / name, "--output")


def test_output_folder_that_is_not_free_is_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("keep")
    (tmp_path / "file").write_text("keep")
    for check in (check_output_folder, lambda path, flag: staged_folder(path, flag).__enter__()):
        with pytest.raises(ConfigError, match=r"^--output_dir .*full is not empty"):
            check(tmp_path / "full", "--output_dir")
        with pytest.raises(ConfigError, match=r"^--output_dir .*file is a file"):
            check(tmp_path / "file", "--output_dir")
        with pytest.raises(ConfigError, match=r"^--output_dir .*out: .*file is a file"):
            check(tmp_path / "file" / "out", "--output_dir")
    assert files(tmp_path) == ["file", "full"]


def test_working_folder_is_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be replaced, and the user's shell would be in a folder that does not exist any more."""
    monkeypatch.chdir(tmp_path)
    for name in (Path("."), tmp_path):
        with pytest.raises(ConfigError, match="is the working folder"):
            check_output_folder(name, "--output")


def test_result_is_kept_if_the_output_folder_is_taken_meanwhile(tmp_path: Path) -> None:
    message = r"cannot be replaced by the result.* result is in .*out\.partial/out: move it"
    with pytest.raises(ConfigError, match=message), staged_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("complete")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "other").touch()
    assert (folder / "file").read_text() == "complete"
    (tmp_path / "out" / "other").unlink()
    with staged_folder(tmp_path / "out"):
        pass
    assert (folder / "file").read_text() == "complete"


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_temporary_folder_starts_empty_and_is_removed(tmp_path: Path, error: type[BaseException] | None) -> None:
    path = tmp_path / "new" / ".saving"
    with suppress(RuntimeError, KeyboardInterrupt), temporary_folder(path) as folder:
        assert folder.parent == path and files(folder) == []
        (folder / "moved").touch()
        (folder / "rest").touch()
        (folder / "moved").rename(tmp_path / "moved")
        if error is not None:
            raise error
    assert files(tmp_path) == ["moved", "new"] and files(tmp_path / "new") == []
