"""Write data files for tests, and read their records or the fault in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from data_utils.files import Location, read_records
from errors import DataError

FORMAT = ". A data file is UTF-8: one JSON list of conversations, or one JSON object per line"


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def values(path: Path) -> list[object]:
    return [value for _, value in read_records(path)]


def fault(path: Path) -> str:
    """Return the message of the fault after which nothing is read."""
    with pytest.raises(DataError) as error:
        list(read_records(path))
    assert "\n" not in str(error.value)
    return str(error.value)


def as_text(items: Iterable[tuple[Location, object]]) -> list[tuple[str, object]]:
    """Replace locations and faults by their text, which can be compared."""
    return [(str(location), str(value) if isinstance(value, DataError) else value) for location, value in items]


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))
