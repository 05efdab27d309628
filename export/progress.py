"""The progress bar of a checkpoint that is being written."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

from checkpoints.source import TensorSource


def progress_bar(source: TensorSource, description: str) -> Any:
    """A bar over the bytes of all tensors of ``source``."""
    return tqdm(total=source.total_nbytes(), desc=description, unit="B", unit_scale=True)
