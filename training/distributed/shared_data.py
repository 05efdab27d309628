"""Data that is read and tokenised once per host; the ranks of a host share the result through memory-mapped files."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data_utils.examples import ExampleSet
from data_utils.report.data_report import DataReport
from errors import ConfigError, DataError, shared
from training.distributed.world import World


def load_shared(world: World, load: Callable[[], dict[str, ExampleSet]]) -> dict[str, ExampleSet]:
    """Return the result of ``load``, which only one rank of each host calls.

    The other ranks of a host get the same examples with an empty data report. They wait without a time-out.

    Raises:
        ConfigError: the data of a host is unusable; raised on all ranks.
        RunError: a rank failed for another reason.
    """
    if world.size == 1:
        return load()
    sets: dict[str, ExampleSet] = {}
    message: dict[str, Any] = {}
    folder, own_error = None, None
    try:
        if world.is_local_rank0:
            try:
                sets = load()
            except (DataError, ConfigError) as error:
                own_error, message = error, {"error": str(error)}
            else:
                if _count_ranks_here(world) > 1:
                    folder = Path(tempfile.mkdtemp(prefix="qwen-data-"))
                    message = {"folder": str(folder), "sets": _save(sets, folder)}
        messages = world.gather("reading data", message)
        for rank, received in enumerate(messages):
            if "error" in received:
                prefix = f"{world.describe(rank)}: " if rank else ""
                raise shared(ConfigError(prefix + received["error"])) from own_error
        if "folder" in messages[world.local_rank0]:
            sets = _open(messages[world.local_rank0], sets)
        world.barrier("opening data")
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)  # mapped files stay readable
    return sets


def _count_ranks_here(world: World) -> int:
    return world.hosts.count(world.hosts[world.rank])


def _save(sets: Mapping[str, ExampleSet], folder: Path) -> list[str]:
    try:
        for name, examples in sets.items():
            examples.save(folder / name)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(error.errno, error.strerror, f"{folder} (set TMPDIR to use another folder)") from error
        raise
    return list(sets)


def _open(message: Mapping[str, Any], own: Mapping[str, ExampleSet]) -> dict[str, ExampleSet]:
    """Open the sets of a folder; the rank that read the data keeps its reports."""
    return {
        name: ExampleSet.load(Path(message["folder"], name), own[name].report if name in own else DataReport(name))
        for name in message["sets"]
    }
