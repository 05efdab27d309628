"""The processes of a run, and what they tell each other without a collective.

Collectives time out when a process is slow for a good reason: it tokenises, reads weights from a slow disk, writes a
large checkpoint. What is said here goes through the key-value store that torch.distributed keeps anyway, and is waited
for as long as the other side lives.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from errors import RunError

logger = logging.getLogger(__name__)

_FIRST_PAUSE, _LONGEST_PAUSE = 0.01, 0.5  # seconds between two looks
_SAID_AFTER = 30.0  # seconds of waiting between two lines of the log


class World:
    """All processes of a run, seen from one of them.

    Every method that takes a ``topic`` is called by all processes, in the same order for the same topic.

    Attributes:
        rank, size: which process this is, of how many.
        name: tells these processes from those that torchrun started before them, after a failure.
        hosts: for each process the name of the machine it runs on; processes that share one share a name.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None, name: str = "") -> None:
        self.rank, self.size, self.name = rank, size, name
        self._store = store
        self._calls: Counter[str] = Counter()
        self.hosts = [f"rank {rank}" for rank in range(size)]
        self.hosts = _names(self.gather("host", [socket.gethostname(), _machine()]))

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and talks."""
        return self.rank == 0

    @property
    def leader(self) -> int:
        """The first process on this one's host: what is done once for a host, it does."""
        return self.hosts.index(self.hosts[self.rank])

    @property
    def is_leader(self) -> bool:
        return self.rank == self.leader

    def describe(self, rank: int) -> str:
        """``rank 3``, with its host where there are several."""
        return f"rank {rank} ({self.hosts[rank]})" if len(set(self.hosts)) > 1 else f"rank {rank}"

    def gather(self, topic: str, value: Any) -> list[Any]:
        """What each process says of a topic, by rank; waits for all of them, however long it takes.

        Args:
            value: what JSON can hold.

        Raises:
            RunError: another process said that it failed, or the first one is gone.
        """
        if self.size == 1:
            return [value]
        keys = self._keys(topic)
        self._set(keys[self.rank], value)
        return [self._get(key, rank, topic) for rank, key in enumerate(keys)]

    def first_says(self, topic: str, value: Any = None) -> Any:
        """What the first process says of a topic; the others' values do not count.

        Raises:
            RunError: see :meth:`gather`.
        """
        return self.says(topic, 0, value)

    def says(self, topic: str, speaker: int, value: Any = None) -> Any:
        """What the process ``speaker`` says of a topic.

        Raises:
            RunError: see :meth:`gather`.
        """
        if self.size == 1:
            return value
        key = self._keys(topic)[speaker]
        if self.rank == speaker:
            self._set(key, value)
            return value
        return self._get(key, speaker, topic)

    def wait(self, topic: str) -> None:
        """Go on when all processes have come here.

        Raises:
            RunError: see :meth:`gather`.
        """
        self.gather(topic, None)

    def leave(self) -> None:
        """End without a word more: the first process, which the others talk through, waits until all have come here."""
        for rank in range(1, self.size):
            if self.rank in (0, rank):
                self.says(f"leave {rank}", rank)

    def report_failure(self, message: str) -> None:
        """Tell those who wait that this process will not come."""
        if self.size > 1:
            with contextlib.suppress(RuntimeError):  # nobody is left to be told
                self._store.compare_set("failed", "", json.dumps([self.rank, message]))  # the first one counts

    def _keys(self, topic: str) -> list[str]:
        number = self._calls[topic]
        self._calls[topic] += 1
        return [f"{topic}/{number}/{rank}" for rank in range(self.size)]

    def _set(self, key: str, value: Any) -> None:
        try:
            self._store.set(key, json.dumps(value))
        except RuntimeError as error:
            raise self._gone() from error

    def _get(self, key: str, rank: int, topic: str) -> Any:
        pause, started, said = _FIRST_PAUSE, time.monotonic(), 0
        try:
            while not self._store.check([key]):
                if self._store.check(["failed"]):
                    failed, message = json.loads(self._store.get("failed"))
                    raise RunError(f"{self.describe(failed)} failed: {message}", "The other processes ended with it")
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
                if time.monotonic() - started > _SAID_AFTER * (said + 1):
                    said += 1
                    logger.info("Waiting for %s: %s (%d s)", self.describe(rank), topic, _SAID_AFTER * said)
            return json.loads(self._store.get(key))
        except RuntimeError as error:
            if isinstance(error, RunError):
                raise
            raise self._gone() from error

    def _gone(self) -> RunError:
        return RunError(
            "Rank 0, which the processes of a run talk through, cannot be reached any more",
            "Look at the first error among the other processes' lines, or at its host",
        )


def join_world() -> World:
    """The world of this process; torch.distributed must have been set up where there are several."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return World()
    # torchrun restarts processes on the store of those that failed: what these said does not count.
    names = [f"qwen-{secrets.token_hex(8)}"]
    dist.broadcast_object_list(names)
    return World(dist.get_rank(), dist.get_world_size(), PrefixStore(names[0], _get_default_store()), names[0])


def _machine() -> str:
    """Tells machines apart that have the same name: containers often do."""
    parts = []
    for file in ("/proc/sys/kernel/random/boot_id", "/etc/machine-id"):
        with contextlib.suppress(OSError):
            parts.append(Path(file).read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/net"))
    return " ".join(parts)


def _names(identities: list[Any]) -> list[str]:
    """Names of machines: host names, numbered where two machines have the same one."""
    machines: dict[str, list[str]] = {}
    for name, machine in identities:
        machines.setdefault(name, [])
        if machine not in machines[name]:
            machines[name].append(machine)
    return [
        name if len(machines[name]) == 1 else f"{name}#{machines[name].index(machine) + 1}"
        for name, machine in identities
    ]
