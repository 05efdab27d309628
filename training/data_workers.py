"""Shared memory of the data workers (``--dataloader_num_workers``): checked before a run, and named when it runs out.

Imports no torch.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from errors import ConfigError, RunError, one_line

_SHARED_MEMORY = "/dev/shm"
_LEAST_FREE = 2**20  # bytes; a worker's batch of short conversations takes some 100 KiB
_FIX = (
    "Give the container more shared memory (docker run --shm-size=1g; in Kubernetes an emptyDir with medium: Memory), "
    "or --dataloader_num_workers 0"
)
_RAN_OUT = re.compile(
    r"out of shared memory|Bus error|unable to (open|write to|mmap|resize|allocate)[^:]* (file|shared memory)"
    r"|torch_shm_manager",
    re.IGNORECASE,
)
_DIED = re.compile(r"DataLoader worker .*(killed by signal|exited unexpectedly)")


def check_workers(count: int) -> None:
    """Check that ``count`` data workers could share memory with this process.

    Raises:
        ConfigError: there is no shared memory, or it is full.
    """
    if count == 0:
        return
    try:
        multiprocessing.Lock()  # a semaphore, which Linux stores there
        if os.path.isdir(_SHARED_MEMORY):
            with tempfile.TemporaryFile(dir=_SHARED_MEMORY) as file:
                os.posix_fallocate(file.fileno(), 0, _LEAST_FREE)
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise ConfigError(f"--dataloader_num_workers {count}: {_describe(reason)}", _FIX) from error


@contextmanager
def worker_errors(count: int) -> Iterator[None]:
    """Turn the death of data workers, most often for want of shared memory, into one ``RunError``.

    Args:
        count: ``--dataloader_num_workers``.
    """
    try:
        yield
    except RunError:
        raise
    except (RuntimeError, OSError) as error:
        lines = str(error).splitlines() if count else []
        if line := next((line for line in lines if _RAN_OUT.search(line)), None):
            raise RunError(f"--dataloader_num_workers {count}: {_describe(line.strip())}", _FIX) from error
        if line := next((line for line in lines if _DIED.search(line)), None):
            fix = "Most often memory ran out: give it more, or lower --dataloader_num_workers"
            raise RunError(f"--dataloader_num_workers {count}: {line.strip()}", fix) from error
        raise


def _describe(reason: str) -> str:
    return f"the data workers have no room in shared memory, {_SHARED_MEMORY} ({reason})"
