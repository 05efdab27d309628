"""Rank and number of the processes of a run, as the launcher's environment variables give them."""

from __future__ import annotations

import os


def count_processes() -> int:
    """Number of processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process has rank 0."""
    return os.environ.get("RANK", "0") == "0"


def has_gpu() -> bool:
    """Whether CUDA has a device. Imports torch."""
    import torch

    return torch.cuda.is_available()
