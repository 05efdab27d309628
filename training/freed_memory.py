"""Memory of the host: freed blocks stay with the process while it trains on a CPU, so no step waits for new pages.

A step frees and allocates the same blocks as the one before. Those that glibc returns to the system are cleared page by
page when they come back: 0.4 of 2.8 CPU seconds of a small model's step.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# What torch and oneDNN read when they are used first. oneDNN, which computes bfloat16 products and large float32 ones,
# keeps 0.5 MB for each of up to 1,024 shapes, twice, and every number of tokens makes new shapes.
LIBRARY_SETTINGS = {
    "THP_MEM_ALLOC_ENABLE": "1",  # large blocks take huge pages
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
    "LRU_CACHE_CAPACITY": "128",
}
_VARIABLES = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
# Parameters of glibc's mallopt, and their values before it is called.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_DEFAULT_TRIM_THRESHOLD, _DEFAULT_MMAP_MAX = 64 * 2**20, 65536


def set_up_libraries() -> None:
    """Set what libraries read from the environment when they are used first, unless the user has set it."""
    for name, value in LIBRARY_SETTINGS.items():
        os.environ.setdefault(name, value)


def describe_memory(is_kept: bool) -> str:
    """Return what becomes of freed memory in a run on a CPU, for the start-up block."""
    reason = why_returned() if is_kept else "gradients of embeddings would leave gaps"
    freed = f"returned when it is freed ({reason})" if reason else "kept by the process when it is freed"
    return f"{freed}; {' '.join(f'{name}={os.environ.get(name)}' for name in LIBRARY_SETTINGS)}"


@contextmanager
def kept_freed_memory(is_kept: bool) -> Iterator[None]:
    """Let glibc keep what is freed, and return all of it at the end."""
    library = _glibc() if is_kept and not why_returned() else None
    if library is None:
        yield
        return
    # All blocks are then of the heap, whose free end is never cut off.
    library.mallopt(_MMAP_MAX, 0)
    library.mallopt(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        library.mallopt(_MMAP_MAX, _DEFAULT_MMAP_MAX)
        library.mallopt(_TRIM_THRESHOLD, _DEFAULT_TRIM_THRESHOLD)
        library.malloc_trim(0)


def why_returned() -> str:
    """Return why freed memory goes back to the system in spite of ``kept_freed_memory``; empty if it does not."""
    for name in _VARIABLES:
        if name in os.environ:
            return f"{name}={os.environ[name]}"
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return f"GLIBC_TUNABLES={os.environ['GLIBC_TUNABLES']}"
    return "" if _glibc() is not None else "the C library is not glibc"


def _glibc() -> Any:
    """Return glibc; ``None`` where the process has another C library."""
    if not sys.platform.startswith("linux"):
        return None
    library: Any = ctypes.CDLL(None)
    return (
        library if all(hasattr(library, name) for name in ("mallopt", "malloc_trim", "gnu_get_libc_version")) else None
    )
