"""Hang detection: the rank that the others wait for is reported, and a waiting rank never is."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from training.checks import check_args
from training.config.parsing import parse_args
from training.distributed.heartbeat import HangDetector, Heartbeat, RankStatus
from training.distributed.world import World

TIMEOUT = 60.0
Report = tuple[float, int, str]


def watch(change: Callable[[list[RankStatus], int], None], seconds: int = 600) -> Report | None:
    """Return the first report of a detector that checks three ranks once a second, and the second of the report.

    Args:
        change: changes the statuses in a second; each already has one heartbeat more.
    """
    detector = HangDetector(TIMEOUT)
    statuses = [RankStatus(progress=100, activity=100, step=12, phase="while training") for _ in range(3)]
    for second in range(seconds):
        for status in statuses:
            status.heartbeats += 1
        change(statuses, second)
        report = detector.check([replace(status) for status in statuses], float(second))
        if report is not None:
            return second, *report
    return None


def stop(status: RankStatus) -> None:
    """Undo the heartbeat of this second: the whole process is stopped."""
    status.heartbeats -= 1


def test_silent_rank_is_reported_after_timeout() -> None:
    def change(statuses: list[RankStatus], second: int) -> None:
        if second > 100:
            stop(statuses[1])
        statuses[1].phase = "while saving"

    report = watch(change)
    assert report is not None
    second, rank, what = report
    assert (second, rank) == (161, 1)
    assert what == "has sent no heartbeat for 61 s; it was last seen at step 12, while saving"


def test_stuck_rank_behind_the_others_is_reported() -> None:
    """Its thread still sends heartbeats; the others have reached the next collective and wait."""

    def change(statuses: list[RankStatus], second: int) -> None:
        for rank, status in enumerate(statuses):
            if second < 100 or (second == 100 and rank != 1):
                status.record_progress("while training", second)

    report = watch(change)
    assert report is not None
    second, rank, what = report
    assert (second, rank) == (160, 1)
    assert what.startswith("has made no progress for 61 s while others wait for it; it was last seen at step 99, ")


def test_slow_but_active_rank_and_waiting_ranks_are_not_reported() -> None:
    """Rank 1 is behind and writes file after file; the others have waited for ten minutes."""

    def change(statuses: list[RankStatus], second: int) -> None:
        if second == 0:
            statuses[0].record_progress("while training")
            statuses[2].record_progress("while training")
        if second % 50 == 0:
            statuses[1].record_activity("while saving")

    assert watch(change) is None


def test_collective_that_is_slow_for_all_reports_no_rank() -> None:
    assert watch(lambda statuses, second: None) is None


def test_rank_that_loads_longer_than_others_is_not_reported() -> None:
    def change(statuses: list[RankStatus], second: int) -> None:
        statuses[1].progress = statuses[1].activity = 0

    assert watch(change) is None


def test_ended_rank_is_not_reported() -> None:
    """Rank 0 is still writing the result."""

    def change(statuses: list[RankStatus], second: int) -> None:
        statuses[1].has_ended = statuses[2].has_ended = True
        if second > 10:
            stop(statuses[1])

    assert watch(change) is None


def test_failure_is_reported_after_a_grace_period() -> None:
    def change(statuses: list[RankStatus], second: int) -> None:
        if second >= 100:
            statuses[2].failure, statuses[2].has_ended = "the disk is full", True

    assert watch(change) == (111, 2, "failed: the disk is full")


def test_reset_restarts_all_times() -> None:
    """A process that was stopped itself must not blame the others for the time it missed."""
    detector, statuses = HangDetector(TIMEOUT), [RankStatus(), RankStatus()]
    assert detector.check(statuses, 0.0) is None
    assert detector.check(statuses, 59.0) is None
    detector.reset()
    assert detector.check(statuses, 1000.0) is None
    assert detector.check(statuses, 1059.0) is None
    assert detector.check(statuses, 1061.0) is not None


def test_single_process_needs_no_threads() -> None:
    heartbeat = Heartbeat(World(), 600)
    heartbeat.status.record_progress("while training", 3)
    heartbeat.finish()
    assert (heartbeat.status.progress, heartbeat.status.step, heartbeat.status.has_ended) == (1, 3, True)


@pytest.mark.parametrize("seconds", ["-1", "4.9"])
def test_impossible_timeout_is_refused(seconds: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"--heartbeat_timeout {float(seconds):g} is out of range. Give 5 ")):
        check_args(parse_args(["--heartbeat_timeout", seconds, "--data_path", "x.json"]))
