"""Limits for a Parquet file, so that memory stays bounded whatever its bytes stand for.

Before a row group is read, the sizes of its pages decide whether it may be, and how many rows at once. Of the rows that
are read, the size of each is known before it becomes Python objects.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data_utils.parquet_pages import ChunkSizes

if TYPE_CHECKING:
    import numpy as np
    import pyarrow

    Sizes = np.ndarray[Any, np.dtype[np.int64]]

_FREE_BYTES = 256 << 20
"""Uncompressed bytes of a page, of a batch, or of a row group that compresses better than text."""

_FREE_VALUES = 8 << 20
_MAX_RATIO = 100  # uncompressed bytes for one in the file; text takes 2 to 20
_MAX_TEXT_RATIO = 1000  # bytes of text for one in the file, where values repeat
_MAX_VALUES_PER_BYTE = 8
_MAX_WIDTH = 1 << 20
PLAIN_WIDTH = 8
_ITEM_BYTES = 4  # of a value without text, about as in JSON
_MIB = 1 << 20


class TooLarge(Exception):
    """A row group that could take much more memory than its size in the file."""


@dataclass
class Chunk:
    """One column of a row group.

    Attributes:
        name: of the column, for messages.
        is_nested: a row may have any number of values.
        has_prefixes: a text may be written as its difference to the one before.
        width: bytes of a value, also of nulls, if its type fixes them; otherwise 8.
        entry: bytes of the largest text in the dictionary, or of all of it; 0 if its texts are not copied for each
            value that they stand for.
    """

    name: str
    sizes: ChunkSizes
    is_nested: bool
    has_prefixes: bool = False
    width: int = PLAIN_WIDTH
    entry: int = 0

    def expands(self) -> bool:
        """Return whether copies of its dictionary's texts could need more memory than a batch may."""
        return self.sizes.indices * self.entry > _FREE_BYTES

    def largest_copy(self) -> int:
        """Return the largest value that a few bytes can repeat too often."""
        entry = self.entry if self.expands() else 0
        return max(self.width, entry, self.sizes.largest if self.has_prefixes else 0)


def check_chunks(chunks: Sequence[Chunk]) -> None:
    """Check that the pages of a row group may be read.

    Raises:
        TooLarge: they may not.
    """
    compressed = sum(chunk.sizes.compressed for chunk in chunks)
    uncompressed = sum(chunk.sizes.uncompressed for chunk in chunks)
    if uncompressed > max(_FREE_BYTES, _MAX_RATIO * compressed):
        raise TooLarge(f"its {compressed:,} bytes are {uncompressed >> 20:,} MiB uncompressed")
    for chunk in chunks:
        sizes, name = chunk.sizes, f"the column {chunk.name!r:.60}"
        if sizes.values > max(_FREE_VALUES, _MAX_VALUES_PER_BYTE * compressed):
            raise TooLarge(f"{name} has {sizes.values:,} values in {sizes.compressed:,} bytes")
        if sizes.largest > _FREE_BYTES:
            raise TooLarge(f"{name} has a page of {sizes.largest >> 20:,} MiB, the limit is {_FREE_BYTES >> 20}")
        if chunk.width > _MAX_WIDTH:
            raise TooLarge(f"{name} has values of {chunk.width:,} bytes each")


def rows_at_once(chunks: Sequence[Chunk], most: int) -> int:
    """Return how many rows of a checked row group may be read at once.

    Raises:
        TooLarge: it must not be read, because a single row could be too large.
    """
    rows = most
    for chunk in chunks:
        copy, values = chunk.largest_copy(), chunk.sizes.values
        if values * copy > _FREE_BYTES:
            if chunk.is_nested and copy > PLAIN_WIDTH:
                raise TooLarge(
                    f"the column {chunk.name!r:.60} may repeat {copy:,} bytes up to {values:,} times in a row"
                )
            rows = min(rows, max(1, _FREE_BYTES // copy))
    if sum(chunk.sizes.uncompressed for chunk in chunks) > _FREE_BYTES:
        # A row group of any size: the rows of a batch come from at most so many pages.
        rows = min(rows, max(1, _FREE_BYTES // (2 * sum(chunk.sizes.largest for chunk in chunks))))
    return rows


def check_text_size(text: int, size: int) -> None:
    """Check that the rows read so far have no more text than a file could have.

    Args:
        text: their size, see ``value_sizes``.
        size: bytes of the file.

    Raises:
        TooLarge: they have.
    """
    if text > max(_FREE_BYTES, _MAX_TEXT_RATIO * size):
        raise TooLarge(f"its {size:,} bytes are more than {text >> 20:,} MiB of text")


def leaf_arrays(array: pyarrow.Array) -> Iterator[pyarrow.Array]:
    """Yield the arrays of plain values within an array, in the order of the file's leaves."""
    from pyarrow import types

    if types.is_struct(array.type):
        for index in range(array.type.num_fields):
            yield from leaf_arrays(array.field(index))
    elif types.is_map(array.type):
        yield from leaf_arrays(array.keys)
        yield from leaf_arrays(array.items)
    elif types.is_nested(array.type) and hasattr(array, "values"):
        yield from leaf_arrays(array.values)
    else:
        yield array


def longest_entry(array: pyarrow.Array) -> int:
    """Return the length of the longest text in the dictionary of an array, in bytes."""
    from pyarrow import compute

    return int(compute.max(compute.binary_length(array.dictionary)).as_py() or 0)


def value_sizes(array: pyarrow.Array) -> Sizes:
    """Return the approximate size of each value of an array as JSON text, in bytes."""
    import numpy as np
    from pyarrow import compute, types

    type_, count = array.type, len(array)
    if types.is_dictionary(type_):
        inner = np.append(value_sizes(array.dictionary), _ITEM_BYTES)  # the last one for nulls
        return inner[compute.fill_null(array.indices, len(inner) - 1).to_numpy(zero_copy_only=False)]
    if types.is_string(type_) or types.is_large_string(type_) or types.is_binary(type_) or types.is_large_binary(type_):
        lengths = compute.fill_null(compute.binary_length(array), 0).to_numpy(zero_copy_only=False)
        return lengths.astype(np.int64) + _ITEM_BYTES
    if types.is_struct(type_):
        own = np.full(count, _ITEM_BYTES, np.int64)
        names = sum(len(field.name) for field in type_)
        return sum((value_sizes(array.field(index)) for index in range(type_.num_fields)), own + names)
    if types.is_map(type_):
        return _list_sizes(array.offsets, value_sizes(array.keys) + value_sizes(array.items))
    if types.is_fixed_size_list(type_):
        inner = value_sizes(array.values)[array.offset * type_.list_size :][: count * type_.list_size]
        return inner.reshape(count, type_.list_size).sum(axis=1) + _ITEM_BYTES
    if types.is_list(type_) or types.is_large_list(type_):
        return _list_sizes(array.offsets, value_sizes(array.values))
    return np.full(count, _ITEM_BYTES, np.int64)


def _list_sizes(offsets: pyarrow.Array, items: Sizes) -> Sizes:
    """Return the size of each list from the sizes of all items."""
    import numpy as np

    ends = np.append(0, np.cumsum(items))[offsets.to_numpy(zero_copy_only=False)]
    return np.diff(ends) + _ITEM_BYTES
