"""Files written in one step, and outputs that are refused before work begins."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from errors import ConfigError
from outputs import check_outside_inputs, staged_file
from ownership import MARK, OwnedFolder
from tests.commands import names_in


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failed_write_leaves_the_previous_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("first")
    with pytest.raises(error), staged_file(path) as staging:
        staging.write_text("half")
        raise error
    assert names_in(tmp_path) == ["notes.txt"] and path.read_text() == "first"


def test_failed_write_names_the_file(tmp_path: Path) -> None:
    """An error of ``write`` has no file name of its own."""
    path = tmp_path / "notes.txt"
    with pytest.raises(OSError, match=r"No space left on device: .*notes.txt"), staged_file(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_second_writer_of_a_file_is_refused_with_the_name_of_the_first(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    with staged_file(path) as staging:
        staging.write_text("first")
        with pytest.raises(ConfigError, match=rf"notes.txt is in use by \S+ \(process {os.getpid()} "):
            staged_file(path).__enter__()
    assert path.read_text() == "first" and names_in(tmp_path) == ["notes.txt"]


def test_writers_at_the_same_time_leave_one_complete_file(tmp_path: Path) -> None:
    path, refused = tmp_path / "out", []

    def write(text: str) -> None:
        for _ in range(10):
            try:
                with staged_file(path) as staging, staging.open("w") as file:
                    for _ in range(100):
                        file.write(text)
                        file.flush()
            except ConfigError as error:
                refused.append(error)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in ("a" * 100, "b" * 100, "c" * 100, "d" * 100)
    assert len(refused) < 40 and names_in(tmp_path) == ["out"]


@pytest.mark.parametrize(
    "plant",
    [
        lambda path, target: path.symlink_to(target),
        lambda path, target: path.symlink_to(target.with_name("absent")),
        lambda path, target: path.write_text("mine"),
        lambda path, target: os.mkfifo(path),
        lambda path, target: (path.mkdir(), (path / "notes").write_text("mine")),
    ],
)
def test_what_lies_at_a_temporary_name_is_left_alone(tmp_path: Path, plant: Callable[[Path, Path], object]) -> None:
    """A link there would be written through to any file."""
    target = tmp_path / "target"
    target.write_text("mine")
    for name in (".out.partial", ".out.partial-2"):
        plant(tmp_path / name, target)
    before = {name: os.lstat(tmp_path / name) for name in names_in(tmp_path)}
    with staged_file(tmp_path / "out") as staging:
        staging.write_text("ours")
    assert (tmp_path / "out").read_text() == "ours" and target.read_text() == "mine"
    assert names_in(tmp_path) == sorted([*before, "out"])
    assert all(os.lstat(tmp_path / name).st_mtime_ns == status.st_mtime_ns for name, status in before.items())


def test_leftover_of_a_dead_process_is_removed_by_the_next_write(tmp_path: Path) -> None:
    leftover = tmp_path / ".out.partial"
    leftover.mkdir()
    owned = OwnedFolder(leftover, "x")
    (leftover / "out").write_text("half")
    text = (leftover / MARK).read_text()
    owned.release()
    (leftover / MARK).write_text(text)  # as a killed process leaves it
    with staged_file(tmp_path / "out") as staging:
        assert not staging.exists()
        staging.write_text("ours")
    assert names_in(tmp_path) == ["out"]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/null")])
def test_only_a_file_is_replaced(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "out")
    mode = os.lstat(tmp_path / "out").st_mode
    with pytest.raises(ConfigError, match=r"out is a (named pipe|folder|symbolic link), not a file"):
        staged_file(tmp_path / "out").__enter__()
    assert names_in(tmp_path) == ["out"] and os.lstat(tmp_path / "out").st_mode == mode


def test_file_that_appears_meanwhile_is_kept_if_it_may_not_be_replaced(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="out exists"), staged_file(tmp_path / "out", replaces=False) as staging:
        staging.write_text("second")
        (tmp_path / "out").write_text("first")
    assert (tmp_path / "out").read_text() == "first" and names_in(tmp_path) == ["out"]


def test_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    with staged_file(tmp_path / "out") as staging:
        staging.write_text("")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_inputs_are_recognised_under_any_name(tmp_path: Path) -> None:
    """A hub's cache has links to files with other names."""
    snapshot, blobs = tmp_path / "snapshots" / "1", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abc").write_text("{}")
    (snapshot / "config.json").symlink_to(blobs / "abc")
    (tmp_path / "second").hardlink_to(blobs / "abc")
    (tmp_path / "link").symlink_to(snapshot)
    inputs = {"--model": [tmp_path / "link"]}
    for output in (blobs / "abc", tmp_path / "second"):
        with pytest.raises(ConfigError, match=r"is config\.json of --model"):
            check_outside_inputs(output, "--json", inputs)
    for output in (snapshot / "new", tmp_path / "link" / "new", tmp_path / "link" / ".." / "1" / "config.json"):
        with pytest.raises(ConfigError, match=r"is inside the folder of --model|is config\.json"):
            check_outside_inputs(output, "--json", inputs)
    check_outside_inputs(tmp_path / "new", "--json", inputs)
