"""Columns of numbers as files: written piece by piece, then memory-mapped by every process of a host.

Neither writing nor reading takes memory that grows with the columns: mapped pages belong to the
operating system's cache.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

_BUFFERED_BYTES = 1 << 20  # of a column, before they are written
_CHECKED_BYTES = 1 << 22  # read at once


class DamagedError(Exception):
    """A stored file is missing, or not as it was written; the message names it."""


class ColumnWriter:
    """Writes columns to a new folder, one file each.

    Args:
        types: the array type of each column, by its name: a code of the module ``array``.
    """

    def __init__(self, folder: Path, types: Mapping[str, str]) -> None:
        folder.mkdir(parents=True)
        self.buffers: dict[str, array[Any]] = {name: array(code) for name, code in types.items()}
        self._folder = folder
        self._counts = dict.fromkeys(types, 0)
        self._checksums = dict.fromkeys(types, 0)

    def count(self, name: str) -> int:
        """Return the number of items of a column."""
        return self._counts[name] + len(self.buffers[name])

    def flush(self, is_last: bool = False) -> None:
        """Write the buffers that are full, or all of them."""
        for name, buffer in self.buffers.items():
            if buffer and (is_last or len(buffer) * buffer.itemsize >= _BUFFERED_BYTES):
                data = memoryview(buffer).cast("B")
                self._checksums[name] = zlib.crc32(data, self._checksums[name])
                self._counts[name] += len(buffer)
                with _path(self._folder, name).open("ab") as file:
                    file.write(data)
                self.buffers[name] = array(buffer.typecode)

    def close(self) -> dict[str, Any]:
        """Write what is left, and return the description that ``open_columns`` needs; JSON can represent it."""
        self.flush(is_last=True)
        return {
            name: {"type": buffer.typecode, "count": self._counts[name], "crc32": self._checksums[name]}
            for name, buffer in self.buffers.items()
        }


def open_columns(folder: Path, description: Mapping[str, Any], verify: bool = True) -> dict[str, Any]:
    """Return the columns of a folder as memory-mapped arrays. They stay readable after the folder has been removed.

    Args:
        verify: compare the checksums, for which all bytes are read.

    Raises:
        DamagedError: a file is missing or has another size or checksum.
    """
    columns = {}
    for name, stated in description.items():
        path, type_ = _path(folder, name), np.dtype(stated["type"])
        try:
            size = path.stat().st_size if stated["count"] else 0  # an empty column has no file
        except OSError as error:
            raise DamagedError(f"{path}: {error.strerror}") from None
        if size != stated["count"] * type_.itemsize:
            raise DamagedError(f"{path} has {size:,} bytes, not {stated['count'] * type_.itemsize:,}")
        # As plain arrays over the same pages: reading one element of a numpy.memmap is several times slower.
        columns[name] = np.asarray(np.memmap(path, type_, "r")) if size else np.empty(0, type_)
        if verify and _checksum(columns[name]) != stated["crc32"]:
            raise DamagedError(f"{path} has another checksum than when it was written")
    return columns


def _checksum(column: Any) -> int:
    checksum, data = 0, memoryview(column).cast("B") if len(column) else b""
    for start in range(0, len(data), _CHECKED_BYTES):
        checksum = zlib.crc32(data[start : start + _CHECKED_BYTES], checksum)
    return checksum


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name}.bin"
