"""The ranks of a run, and messages between them without a collective.

A collective times out if a rank is slow for a good reason: it tokenises, reads weights from a slow disk or writes a
large checkpoint. These messages go through the key-value store that torch.distributed has anyway, without a time-out: a
rank waits until the message arrives or another rank reports its failure. Collectives of gloo with a long time-out learn
of a failure only when the process exits, and then neither its rank nor the cause.
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

_FIRST_PAUSE, _LONGEST_PAUSE = 0.01, 0.5  # seconds between two polls of the store
_LOG_INTERVAL = 30.0  # seconds of waiting between two log lines


class World:
    """All ranks of a run, as seen by one of them.

    All ranks must call the methods that take a ``topic``, in the same order for the same topic.

    Attributes:
        rank, size: rank of this process and number of processes.
        name: identifies this start of the run: torchrun may restart the processes after a failure.
        hosts: name of each rank's host, by rank; ranks on the same host have the same name.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None, name: str = "") -> None:
        self.rank, self.size, self.name = rank, size, name
        self._store = store
        self._calls: Counter[str] = Counter()
        self.hosts = [f"rank {rank}" for rank in range(size)]  # until the real names are known
        self.hosts = _host_names(self.gather("host", [socket.gethostname(), _machine_id()]))

    @property
    def is_first(self) -> bool:
        """Return whether this is rank 0, which writes files and logs."""
        return self.rank == 0

    @property
    def local_rank0(self) -> int:
        """The lowest rank on this host, which does what is done once per host."""
        return self.hosts.index(self.hosts[self.rank])

    @property
    def is_local_rank0(self) -> bool:
        return self.rank == self.local_rank0

    def describe(self, rank: int) -> str:
        """Return ``rank 3`` for messages, with its host if the run has several."""
        return f"rank {rank} ({self.hosts[rank]})" if len(set(self.hosts)) > 1 else f"rank {rank}"

    def gather(self, topic: str, value: Any) -> list[Any]:
        """Return the ``value`` of every rank, by rank, on all ranks.

        Args:
            value: anything that JSON can represent.

        Raises:
            RunError: another rank reported a failure, or rank 0 cannot be reached.
        """
        if self.size == 1:
            return [value]
        keys = self._next_keys(topic)
        self._set(keys[self.rank], value)
        return [self._get(key, rank, topic) for rank, key in enumerate(keys)]

    def broadcast(self, topic: str, source: int, value: Any = None) -> Any:
        """Return the ``value`` of rank ``source`` on all ranks.

        Raises:
            RunError: see :meth:`gather`.
        """
        if self.size == 1:
            return value
        key = self._next_keys(topic)[source]
        if self.rank == source:
            self._set(key, value)
            return value
        return self._get(key, source, topic)

    def broadcast_from_rank0(self, topic: str, value: Any = None) -> Any:
        """Return the ``value`` of rank 0 on all ranks.

        Raises:
            RunError: see :meth:`gather`.
        """
        return self.broadcast(topic, 0, value)

    def barrier(self, topic: str) -> None:
        """Wait until all ranks have called this.

        Raises:
            RunError: see :meth:`gather`.
        """
        self.gather(topic, None)

    def final_barrier(self) -> None:
        """Let rank 0, which hosts the store, wait until every other rank has read its last message.

        Raises:
            RunError: see :meth:`gather`.
        """
        for rank in range(1, self.size):
            if self.rank in (0, rank):
                self.broadcast(f"leave {rank}", rank)

    def report_failure(self, message: str) -> None:
        """Make the calls of all waiting ranks raise, because this rank fails. Only the first report counts."""
        if self.size > 1:
            with contextlib.suppress(RuntimeError):  # the store is gone, and with it everyone who could wait
                self._store.compare_set("failed", "", json.dumps([self.rank, message]))

    def _next_keys(self, topic: str) -> list[str]:
        """Return the store's key of each rank for the next call with this topic."""
        number = self._calls[topic]
        self._calls[topic] += 1
        return [f"{topic}/{number}/{rank}" for rank in range(self.size)]

    def _set(self, key: str, value: Any) -> None:
        try:
            self._store.set(key, json.dumps(value))
        except RuntimeError as error:
            raise self._store_lost() from error

    def _get(self, key: str, rank: int, topic: str) -> Any:
        pause, started, lines = _FIRST_PAUSE, time.monotonic(), 0
        try:
            while not self._store.check([key]):
                if self._store.check(["failed"]):
                    failed, message = json.loads(self._store.get("failed"))
                    raise RunError(f"{self.describe(failed)} failed: {message}", "The other processes ended with it")
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
                if time.monotonic() - started > _LOG_INTERVAL * (lines + 1):
                    lines += 1
                    logger.info("Waiting for %s: %s (%d s)", self.describe(rank), topic, _LOG_INTERVAL * lines)
            return json.loads(self._store.get(key))
        except RuntimeError as error:
            if isinstance(error, RunError):
                raise
            raise self._store_lost() from error

    def _store_lost(self) -> RunError:
        return RunError(
            "Rank 0, which hosts the store for messages between ranks, cannot be reached any more",
            "See the first error in the output of the other processes, or check the host of rank 0",
        )


def join_world() -> World:
    """Return the world of this process. With several processes torch's default process group must exist."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return World()
    # After a restart torchrun may pass on the store of the failed processes: a new prefix ignores their messages.
    names = [f"qwen-{secrets.token_hex(8)}"]
    dist.broadcast_object_list(names)
    return World(dist.get_rank(), dist.get_world_size(), PrefixStore(names[0], _get_default_store()), names[0])


def _machine_id() -> str:
    """Return an identifier of this machine: several containers often have the same host name."""
    parts = []
    for file in ("/proc/sys/kernel/random/boot_id", "/etc/machine-id"):
        with contextlib.suppress(OSError):
            parts.append(Path(file).read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/net"))
    return " ".join(parts)


def _host_names(identities: list[Any]) -> list[str]:
    """Return a unique name for each rank's host from (host name, machine id); equal host names get a number."""
    machines: dict[str, list[str]] = {}
    for name, machine in identities:
        machines.setdefault(name, [])
        if machine not in machines[name]:
            machines[name].append(machine)
    return [
        name if len(machines[name]) == 1 else f"{name}#{machines[name].index(machine) + 1}"
        for name, machine in identities
    ]
