"""Progress bar for writing the tensors of a checkpoint."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

from checkpoints.source import TensorSource


def progress_bar(source: TensorSource, description: str) -> Any:
    """Return a tqdm bar over the bytes of all tensors of ``source``, which is drawn on terminals only."""
    return tqdm(total=source.total_nbytes(), desc=description, unit="B", unit_scale=True, disable=None)
