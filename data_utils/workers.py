"""Worker processes that compute blocks side by side, with the results in the order of the blocks."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any

from errors import RunError

_BLOCKS_AHEAD = 4  # for each worker

# What a worker process calls; it inherits it from its parent.
_target: Any = None


class Workers:
    """Calls methods of an object, in this process or in several others.

    As a context manager it ends the processes, also after an error and Ctrl-C. They end by themselves if this one dies.

    Args:
        target: the object. The other processes have copies of it, as it is at the first call.
        count: number of processes; with 1 there is no other.
    """

    def __init__(self, target: Any, count: int) -> None:
        self._target, self._count = target, count
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def map(self, method: str, blocks: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """Yield the results of the method for the arguments of each block, in order.

        Raises:
            RunError: a worker process has died.
        """
        if self._count == 1:
            for arguments in blocks:
                yield getattr(self._target, method)(*arguments)
            return
        if self._pool is None:
            self._pool = ProcessPoolExecutor(self._count, multiprocessing.get_context("fork"), _begin, (self._target,))
        running: deque[Future[Any]] = deque()
        try:
            for arguments in blocks:
                running.append(self._pool.submit(_call, method, arguments))
                if len(running) > _BLOCKS_AHEAD * self._count:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        except BrokenProcessPool:
            raise RunError(
                f"--dataset_num_proc {self._count}: a worker process has died",
                "Most often memory ran out: give it more, or lower --dataset_num_proc",
            ) from None
        finally:
            for future in running:
                future.cancel()


def _begin(target: Any) -> None:
    global _target
    _target = target
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the workers
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not exist in a forked process
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "this is a worker"
    wait([parent.sentinel])
    os._exit(1)


def _call(method: str, arguments: tuple[Any, ...]) -> Any:
    return getattr(_target, method)(*arguments)
