"""Data that is read and tokenised once for each host; its processes share the result through mapped files."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data_utils.dataset import ExampleSet
from data_utils.report.data_report import DataReport
from errors import ConfigError, DataError, shared
from training.distributed.world import World


def load_shared(world: World, load: Callable[[], dict[str, ExampleSet]]) -> dict[str, ExampleSet]:
    """What ``load`` returns, called by one process of each host only.

    The others of a host get the same examples. Their reports are without sources: what became of the records, the
    process that read them knows. However long it takes, the others wait.

    Raises:
        ConfigError: what was wrong with the data of any host, on all processes.
        RunError: a process failed for another reason.
    """
    if world.size == 1:
        return load()
    sets: dict[str, ExampleSet] = {}
    said: dict[str, Any] = {}
    folder, fault = None, None
    try:
        if world.is_leader:
            try:
                sets = load()
            except (DataError, ConfigError) as error:
                fault, said = error, {"fault": str(error)}
            else:
                if _processes_here(world) > 1:
                    folder = Path(tempfile.mkdtemp(prefix="qwen-data-"))
                    said = {"folder": str(folder), "sets": _save(sets, folder)}
        told = world.gather("reading data", said)
        for rank, each in enumerate(told):
            if "fault" in each:
                place = f"{world.describe(rank)}: " if rank else ""
                raise shared(ConfigError(place + each["fault"])) from fault
        if "folder" in told[world.leader]:
            sets = _open(told[world.leader], sets)
        world.wait("opening data")
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)  # what is mapped stays readable
    return sets


def _processes_here(world: World) -> int:
    return world.hosts.count(world.hosts[world.rank])


def _save(sets: Mapping[str, ExampleSet], folder: Path) -> list[str]:
    try:
        for name, examples in sets.items():
            examples.save(folder / name)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(error.errno, error.strerror, f"{folder} (TMPDIR names another place)") from error
        raise
    return list(sets)


def _open(said: Mapping[str, Any], own: Mapping[str, ExampleSet]) -> dict[str, ExampleSet]:
    """The sets in a folder; the process that has read the data keeps its reports."""
    return {
        name: ExampleSet.load(Path(said["folder"], name), own[name].report if name in own else DataReport(name))
        for name in said["sets"]
    }
