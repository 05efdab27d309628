"""Messages between ranks without a collective: who gets which value, and how a failure reaches those who wait."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytest

from errors import RunError
from tests.worlds import run_on_ranks
from training.distributed import world as world_module
from training.distributed.world import World, _host_names


def test_single_rank_gets_its_own_values() -> None:
    world = World()
    assert world.gather("a", 1) == [1]
    assert world.broadcast_from_rank0("b", 2) == 2
    world.barrier("c")
    world.final_barrier()
    assert world.is_first and world.is_local_rank0


def test_values_reach_all_ranks_in_the_order_of_calls() -> None:
    def work(world: World) -> Any:
        first, second = world.gather("a", world.rank), world.gather("a", 10 * world.rank)
        from_rank0 = world.broadcast_from_rank0("b", f"rank {world.rank}")
        from_rank2 = world.broadcast("c", 2, {"rank": world.rank})
        world.final_barrier()
        return first, second, from_rank0, from_rank2

    assert run_on_ranks(3, work) == [([0, 1, 2], [0, 10, 20], "rank 0", {"rank": 2})] * 3


def test_local_rank_0_is_the_lowest_rank_of_each_host() -> None:
    results = run_on_ranks(4, lambda world: (world.local_rank0, world.describe(3)), ["a", "b", "a", "b"])
    assert results == [(0, "rank 3 (b)"), (1, "rank 3 (b)"), (0, "rank 3 (b)"), (1, "rank 3 (b)")]


def test_failure_reaches_waiting_ranks_with_its_rank_and_cause() -> None:
    def work(world: World) -> None:
        if world.rank == 1:
            raise OSError("disk full")
        world.barrier("saving")

    first, failed, third = run_on_ranks(3, work, ["a", "b", "b"])
    assert str(failed) == "disk full"
    for error in (first, third):
        assert isinstance(error, RunError)
        assert str(error) == "rank 1 (b) failed: disk full. The other processes ended with it"


def test_long_wait_is_logged_with_rank_and_topic(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(world_module, "_LOG_INTERVAL", 0.2)

    def work(world: World) -> None:
        if world.rank == 1:
            time.sleep(0.5)
        world.barrier("reading data")

    with caplog.at_level(logging.INFO):
        assert run_on_ranks(2, work) == [None, None]
    assert caplog.messages[0] == "Waiting for rank 1: reading data (0 s)"


def test_machines_with_equal_host_names_are_numbered() -> None:
    identities = [["a", "machine 1"], ["a", "machine 2"], ["b", "machine 3"], ["a", "machine 1"]]
    assert _host_names(identities) == ["a#1", "a#2", "b", "a#1"]
