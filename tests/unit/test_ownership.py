"""Folders that one process owns: who holds them, when they are free, and what is never removed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import ownership
from errors import ConfigError
from ownership import MARK, NotOursError, OwnedFolder, check_not_in_use, has_mark, make_temporary_folder
from tests.commands import names_in
from tests.golden import REPO


@contextmanager
def another_process(code: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run ``code`` in a process until it has written a line; end it after the block."""
    words = [sys.executable, "-c", f"import os, sys, time, ownership\nfrom pathlib import Path\n{code}", str(folder)]
    with subprocess.Popen(words, cwd=REPO, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


OWN = "owned = ownership.OwnedFolder(Path(sys.argv[1]), 'x')\n"
WAIT = "print('ready', flush=True)\ntime.sleep(60)\n"


def test_folder_of_a_live_process_is_refused_with_its_name_and_free_after_a_kill(tmp_path: Path) -> None:
    with another_process(OWN + WAIT, tmp_path) as process:
        for attempt in (OwnedFolder, check_not_in_use, make_temporary_folder):
            with pytest.raises(
                ConfigError, match=rf"^--output out is in use by -c \(process {process.pid} on \S+, since"
            ):
                attempt(tmp_path, "--output out")
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert has_mark(tmp_path)
        check_not_in_use(tmp_path, "--output out")
        OwnedFolder(tmp_path, "--output out").release()
    assert names_in(tmp_path) == []


def test_child_of_a_killed_owner_does_not_keep_the_folder(tmp_path: Path) -> None:
    child = "if os.fork() == 0:\n    time.sleep(20)\n    os._exit(0)\n"
    with another_process(OWN + child + WAIT, tmp_path) as process:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        OwnedFolder(tmp_path, "x").release()


def test_owner_sees_its_own_folder_as_free_and_releases_only_its_own_mark(tmp_path: Path) -> None:
    owned = OwnedFolder(tmp_path, "x")
    check_not_in_use(tmp_path, "x")
    (tmp_path / MARK).unlink()  # as the message advises for a process that is gone
    other = OwnedFolder(tmp_path, "x")
    owned.release()
    assert names_in(tmp_path) == [MARK]
    other.release()
    assert names_in(tmp_path) == []


def test_temporary_folder_of_a_dead_process_is_emptied_and_used_again(tmp_path: Path) -> None:
    path = tmp_path / "staging"
    path.mkdir()
    with another_process(OWN + WAIT, path) as process:
        (path / "shard").write_text("half")
        (path / "sub").mkdir()
        process.kill()
        process.wait()
        with make_temporary_folder(path, "x") as owned:
            assert owned.path == path and names_in(path) == [MARK]
            (path / "rest").touch()
    assert names_in(tmp_path) == []


def foreign_mark(text: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.mkdir()
        (path / MARK).write_text(text)

    return make


def folder_with_notes(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("mine")


def link_to_folder(path: Path) -> None:
    folder_with_notes(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def linked_mark(path: Path) -> None:
    path.mkdir()
    path.with_name("secret").write_text(json.dumps({"format": ownership._FORMAT}))
    (path / MARK).symlink_to(path.with_name("secret"))


def pipe_as_mark(path: Path) -> None:
    path.mkdir()
    os.mkfifo(path / MARK)


@pytest.mark.parametrize(
    "make",
    [
        folder_with_notes, link_to_folder, linked_mark, pipe_as_mark, os.mkfifo, lambda path: path.write_text("mine"),
        foreign_mark("{}"), foreign_mark("[" * 100_000), foreign_mark('{"format": "other"}'), foreign_mark("\0"),
    ],
)  # fmt: skip
def test_what_is_not_ours_is_never_changed(tmp_path: Path, make: Callable[[Path], object]) -> None:
    path = tmp_path / "out.partial"
    make(path)
    before = sorted((str(each), os.lstat(each).st_mode) for each in tmp_path.rglob("*"))
    with pytest.raises(NotOursError, match=r"has no mark of this toolkit"):
        make_temporary_folder(path, "x")
    assert not has_mark(path)
    assert sorted((str(each), os.lstat(each).st_mode) for each in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("is_alive", [True, False])
def test_without_locks_an_owner_is_alive_while_it_updates_its_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_alive: bool
) -> None:
    monkeypatch.setattr(ownership, "_lock", lambda descriptor, kind: None)
    monkeypatch.setattr(ownership, "_UPDATE_INTERVAL", 0.05)
    monkeypatch.setattr(ownership, "_DEAD_AFTER", 0.5)
    monkeypatch.setattr(ownership, "_PATIENCE", 0.0)
    first = OwnedFolder(tmp_path, "x")
    if is_alive:
        with pytest.raises(ConfigError, match="is in use by"):
            OwnedFolder(tmp_path, "x")
        first.release()
    else:
        first._released.set()  # ends its updates, as its death would
        time.sleep(0.1)
        OwnedFolder(tmp_path, "x").release()
        first.release()
    assert names_in(tmp_path) == []


def test_only_one_of_many_threads_gets_a_folder(tmp_path: Path) -> None:
    start, owned, refused = threading.Barrier(8), [], []

    def claim() -> None:
        start.wait()
        try:
            owned.append(OwnedFolder(tmp_path, "x"))
        except ConfigError as error:
            refused.append(error)

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(owned) == 1 and len(refused) == 7
    owned[0].release()


def test_mark_that_a_full_disk_cuts_off_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "write", lambda descriptor, text: 3)
    with pytest.raises(OSError, match="No space left"):
        make_temporary_folder(tmp_path / "staging", "x")
    assert names_in(tmp_path) == []
