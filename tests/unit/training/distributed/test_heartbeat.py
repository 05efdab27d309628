"""Who is named when a run hangs: the process that the others wait for, and never one of these."""

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
Verdict = tuple[float, int, str]


def watch(change: Callable[[list[RankStatus], int], None], seconds: int = 600) -> Verdict | None:
    """The first verdict of a process that looks once a second at three others, and when it falls.

    Args:
        change: what becomes of the pulses, all of which beat, in a second.
    """
    judge = HangDetector(TIMEOUT)
    pulses = [RankStatus(place=100, moves=100, step=12, phase="while training") for _ in range(3)]
    for second in range(seconds):
        for pulse in pulses:
            pulse.beat += 1
        change(pulses, second)
        verdict = judge.look([replace(pulse) for pulse in pulses], float(second))
        if verdict is not None:
            return second, *verdict
    return None


def stop(pulse: RankStatus) -> None:
    """The whole process stands still."""
    pulse.beat -= 1


def test_a_silent_process_is_named_in_time() -> None:
    def change(pulses: list[RankStatus], second: int) -> None:
        if second > 100:
            stop(pulses[1])
        pulses[1].phase = "while saving"

    verdict = watch(change)
    assert verdict is not None
    second, rank, what = verdict
    assert (second, rank) == (161, 1)
    assert what == "has been silent for 61 s; it was last seen at step 12, while saving"


def test_a_process_that_hangs_behind_the_others_is_named() -> None:
    """Its thread still beats; the others have come to the next collective and wait."""

    def change(pulses: list[RankStatus], second: int) -> None:
        for rank, pulse in enumerate(pulses):
            if second < 100 or (second == 100 and rank != 1):
                pulse.advance("while training", second)

    verdict = watch(change)
    assert verdict is not None
    second, rank, what = verdict
    assert (second, rank) == (160, 1)
    assert what.startswith("has not moved for 61 s, and the others wait for it; it was last seen at step 99, ")


def test_who_waits_is_not_named() -> None:
    """A process that is behind but moves: it writes file after file. The others have not moved for ten minutes."""

    def change(pulses: list[RankStatus], second: int) -> None:
        if second == 0:
            pulses[0].advance("while training")
            pulses[2].advance("while training")
        if second % 50 == 0:
            pulses[1].note("while saving")

    assert watch(change) is None


def test_a_collective_that_is_slow_for_all_names_nobody() -> None:
    assert watch(lambda pulses, second: None) is None


def test_who_loads_for_longer_than_the_others_is_not_named() -> None:
    def change(pulses: list[RankStatus], second: int) -> None:
        pulses[1].place = pulses[1].moves = 0

    assert watch(change) is None


def test_who_is_done_is_not_named() -> None:
    """The first process still writes the result."""

    def change(pulses: list[RankStatus], second: int) -> None:
        pulses[1].ended = pulses[2].ended = True
        if second > 10:
            stop(pulses[1])

    assert watch(change) is None


def test_a_failure_is_passed_on_when_there_was_time_to_end() -> None:
    def change(pulses: list[RankStatus], second: int) -> None:
        if second >= 100:
            pulses[2].failure, pulses[2].ended = "the disk is full", True

    assert watch(change) == (111, 2, "failed: the disk is full")


def test_a_process_that_was_stopped_itself_accuses_nobody() -> None:
    judge, pulses = HangDetector(TIMEOUT), [RankStatus(), RankStatus()]
    assert judge.look(pulses, 0.0) is None
    assert judge.look(pulses, 59.0) is None
    judge.forget()
    assert judge.look(pulses, 1000.0) is None
    assert judge.look(pulses, 1059.0) is None
    assert judge.look(pulses, 1061.0) is not None


def test_one_process_watches_nobody() -> None:
    heartbeat = Heartbeat(World(), 600)
    heartbeat.pulse.advance("while training", 3)
    heartbeat.leave()
    assert (heartbeat.pulse.place, heartbeat.pulse.step, heartbeat.pulse.ended) == (1, 3, True)


@pytest.mark.parametrize("seconds", ["-1", "4.9"])
def test_a_timeout_that_cannot_be(seconds: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"--heartbeat_timeout {float(seconds):g} is not possible. Give 5 ")):
        check_args(parse_args(["--heartbeat_timeout", seconds, "--data_path", "x.json"]))
