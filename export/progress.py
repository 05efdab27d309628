"""Progress bars of an export: bytes written, and steps of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from checkpoints.source import TensorSource


def progress_bar(source: TensorSource, description: str) -> Any:
    """Return a tqdm bar over the bytes of all tensors of ``source``, which is drawn on terminals only."""
    return tqdm(total=source.total_nbytes(), desc=description, unit="B", unit_scale=True, disable=None)


@contextmanager
def steps_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that shows the number of finished steps and their total on a bar, on terminals only."""
    with tqdm(desc=description, unit=" steps", disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
