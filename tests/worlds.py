"""Several ranks of a run as threads of this process, connected by an in-memory store of torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch.distributed import HashStore  # type: ignore[attr-defined]

from training.distributed.world import World


def run_on_ranks(size: int, work: Callable[[World], Any], hosts: Sequence[str] | None = None) -> list[Any]:
    """Run ``work`` on ``size`` ranks at once and return, by rank, its result or the exception it raised.

    Args:
        hosts: host name of each rank; by default all are on one host.
    """
    store = HashStore()

    def run(rank: int) -> Any:
        world = World(rank, size, store)
        world.hosts = list(hosts or world.hosts)
        try:
            return work(world)
        except Exception as error:
            if not getattr(error, "is_shared", False):  # every rank raises a shared one itself, as in a real run
                world.report_failure(str(error))
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))
