"""Data that is prepared once per host; the ranks of a host share the result through memory-mapped files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_utils.examples import ExampleSet
from data_utils.prepared import Prepared, open_prepared
from errors import ConfigError, DataError, shared
from training.distributed.world import World


def load_shared(world: World, load: Callable[[], Prepared]) -> dict[str, ExampleSet]:
    """Return the sets that ``load`` prepares, which only one rank of each host calls.

    The other ranks of a host get the same examples with an empty data report. They wait without a time-out.

    Raises:
        ConfigError: the data of a host is unusable; raised on all ranks.
        RunError: a rank failed for another reason.
    """
    if world.size == 1:
        prepared = load()
        prepared.release()
        return prepared.sets
    own: Prepared | None = None
    message: dict[str, Any] = {}
    own_error = None
    try:
        if world.is_local_rank0:
            try:
                own = load()
            except (DataError, ConfigError) as error:
                own_error, message = error, {"error": str(error)}
            else:
                message = {"folder": str(own.folder)}
        messages = world.gather("reading data", message)
        for rank, received in enumerate(messages):
            if "error" in received:
                prefix = f"{world.describe(rank)}: " if rank else ""
                raise shared(ConfigError(prefix + received["error"])) from own_error
        sets = open_prepared(Path(messages[world.local_rank0]["folder"]), verify=False) if own is None else own.sets
        world.barrier("opening data")
    finally:
        if own is not None:
            own.release()
    return sets
