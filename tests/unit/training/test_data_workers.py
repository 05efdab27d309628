"""Data workers without room in shared memory are reported in one line with the fix."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from errors import ConfigError, RunError
from tests.models import TINY, write_conversations
from training.checks import check_args
from training.config.parsing import parse_args
from training.data_workers import check_workers, worker_errors

PREFIX = "--dataloader_num_workers 2: the data workers have no room in shared memory, /dev/shm"


@pytest.mark.parametrize(
    ("place", "error", "reason"),
    [
        (multiprocessing, FileNotFoundError(2, "No such file or directory"), "No such file or directory"),
        (multiprocessing, PermissionError(13, "Permission denied"), "Permission denied"),
        (os, OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_missing_or_full_shared_memory_is_refused_before_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: object, error: OSError, reason: str
) -> None:
    def fail(*args: object) -> None:
        raise error

    check_workers(2)
    words = ["--model_name_or_path", TINY, "--data_path", write_conversations(tmp_path / "x.json"), "--output_dir",
             tmp_path / "out", "--dataloader_num_workers", 2]  # fmt: skip
    args = parse_args([str(word) for word in words])
    check_args(args)
    monkeypatch.setattr(place, "Lock" if place is multiprocessing else "posix_fallocate", fail)
    check_workers(0)
    with pytest.raises(ConfigError) as caught:
        check_args(args)
    assert str(caught.value).startswith(f"{PREFIX} ({reason}). Give the container more shared memory")


# As torch 2.13 reports them.
FAILURES = [
    'Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File "x.py"\n'
    "RuntimeError: unable to write to file </torch_71_2381_0>: No space left on device (28)\n",
    "unable to open shared memory object </torch_71_2381_0> in read-write mode: No such file or directory (2)",
    "DataLoader worker (pid 71) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
    "shared memory. Please try to raise your shared memory limit.",
]


@pytest.mark.parametrize("message", FAILURES)
def test_workers_that_run_out_of_shared_memory_end_the_run_with_the_fix(message: str) -> None:
    with pytest.raises(RunError) as caught, worker_errors(2):
        raise RuntimeError(message)
    assert str(caught.value).startswith(PREFIX) and "--shm-size=1g" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_killed_worker_ends_the_run_in_one_line() -> None:
    for message in (
        "DataLoader worker (pid(s) 71, 72) exited unexpectedly",
        "DataLoader worker (pid 7) is killed by signal: Killed. ",
    ):
        with (
            pytest.raises(RunError, match=r"--dataloader_num_workers 2: DataLoader worker .*memory ran out"),
            worker_errors(2),
        ):
            raise RuntimeError(message)


def test_other_errors_pass() -> None:
    for count, message in ((2, "size mismatch"), (0, FAILURES[0])):
        with pytest.raises(RuntimeError) as caught, worker_errors(count):
            raise RuntimeError(message)
        assert not isinstance(caught.value, RunError)
