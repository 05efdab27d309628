"""Several processes of a run as threads of this one, which talk through a store of torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch.distributed import HashStore  # type: ignore[attr-defined]

from training.distributed.world import World


def in_each(size: int, work: Callable[[World], Any], hosts: Sequence[str] | None = None) -> list[Any]:
    """What ``work`` returns, or the error it raises, in each of ``size`` processes.

    Args:
        hosts: names of the machines they are to be on; by default one.
    """
    store = HashStore()

    def run(rank: int) -> Any:
        world = World(rank, size, store)
        world.hosts = list(hosts or world.hosts)
        try:
            return work(world)
        except Exception as error:
            world.report_failure(str(error))
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))
