"""Sizes of the pages of a Parquet file, from their headers, before anything is decompressed.

A few bytes can stand for gigabytes: a page that compresses well, an entry of a dictionary that is repeated, levels that
are one long run. The footer's own figures are not used, because only the pages are what is read.

The headers are structs in Thrift's compact protocol; the field numbers are those of parquet.thrift.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

_FIRST_READ, _LARGEST_HEADER = 1 << 8, 1 << 24
_MAX_LEVELS = 16
_STOP, _TRUE, _FALSE, _BYTE, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = 0, 1, 2, 3, 6, 7, 8, 9, 10, 11, 12
# Fields of a PageHeader, and of the header of each kind of page in it.
_KIND, _UNCOMPRESSED, _COMPRESSED, _COUNT = 1, 2, 3, 1
_DATA, _DATA_V2 = 5, 8
_ENCODINGS = {_DATA: 2, _DATA_V2: 4}
_DICTIONARY_PAGE = 2
_INDEX_ENCODINGS = (2, 8)


class PageError(Exception):
    """A page header that cannot be read."""


@dataclass
class ChunkSizes:
    """Sizes of the pages of one column in one row group, in bytes.

    Attributes:
        compressed: sum over all pages.
        uncompressed: sum over all pages.
        largest: the largest page.
        dictionary: its dictionary page; 0 without one.
        values: number of values, including nulls, in all data pages.
        indices: number of those that are indices into the dictionary.
    """

    compressed: int = 0
    uncompressed: int = 0
    largest: int = 0
    dictionary: int = 0
    values: int = 0
    indices: int = 0


def chunk_sizes(descriptor: int, start: int, length: int) -> ChunkSizes:
    """Read the headers of the pages of a column chunk.

    Args:
        descriptor: of the open file.
        start: offset of its first page.
        length: bytes of all its pages with their headers.

    Raises:
        PageError: a header that cannot be read.
    """
    sizes, position = ChunkSizes(), start
    while position < start + length:
        header, header_size = _read_header(descriptor, position)
        compressed, uncompressed = header.get(_COMPRESSED), header.get(_UNCOMPRESSED)
        if not isinstance(compressed, int) or not isinstance(uncompressed, int) or min(compressed, uncompressed) < 0:
            raise PageError(f"a page header at offset {position} has no valid sizes")
        sizes.compressed += compressed
        sizes.uncompressed += uncompressed
        sizes.largest = max(sizes.largest, uncompressed)
        if header.get(_KIND) == _DICTIONARY_PAGE:
            sizes.dictionary = max(sizes.dictionary, uncompressed)
        else:
            kind = _DATA if _DATA in header else _DATA_V2
            data = header.get(kind)
            fields = data if isinstance(data, dict) else {}
            count = fields.get(_COUNT)
            count = max(0, count) if isinstance(count, int) else 0
            sizes.values += count
            sizes.indices += count if fields.get(_ENCODINGS[kind]) in _INDEX_ENCODINGS else 0
        position += header_size + compressed
    return sizes


def _read_header(descriptor: int, position: int) -> tuple[dict[int, Any], int]:
    size = _FIRST_READ
    while True:
        data = os.pread(descriptor, size, position)
        reader = _CompactReader(data)
        try:
            return reader.struct(), reader.position
        except IndexError:
            if len(data) < size or size >= _LARGEST_HEADER:
                raise PageError(f"a page header at offset {position} does not end") from None
            size *= 16


class _CompactReader:
    """Reads values of Thrift's compact protocol; raises ``IndexError`` at the end of the data."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.position = 0

    def struct(self, level: int = 0) -> dict[int, Any]:
        """Read a struct as field number -> value."""
        fields: dict[int, Any] = {}
        number = 0
        while (head := self._byte()) != _STOP:
            delta, kind = head >> 4, head & 15
            number = number + delta if delta else self._integer()
            fields[number] = self._value(kind, level)
        return fields

    def _value(self, kind: int, level: int, in_list: bool = False) -> Any:
        if level > _MAX_LEVELS:
            raise PageError("a page header is nested too deep")
        if kind in (_TRUE, _FALSE):
            return self._byte() if in_list else kind == _TRUE
        if kind == _BYTE:
            return self._byte()
        if _BYTE < kind <= _I64:
            return self._integer()
        if kind == _DOUBLE:
            return self._bytes(8)
        if kind == _BINARY:
            return self._bytes(self._varint())
        if kind in (_LIST, _SET):
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._varint()
            return [self._value(head & 15, level + 1, in_list=True) for _ in range(count)]
        if kind == _MAP:
            count = self._varint()
            kinds = self._byte() if count else 0
            return [
                self._value(kind, level + 1, in_list=True) for _ in range(count) for kind in (kinds >> 4, kinds & 15)
            ]
        if kind == _STRUCT:
            return self.struct(level + 1)
        raise PageError(f"a page header has a value of the unknown type {kind}")

    def _byte(self) -> int:
        value = self._data[self.position]
        self.position += 1
        return value

    def _bytes(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self._data):
            raise IndexError
        value, self.position = self._data[self.position : end], end
        return value

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise PageError("a page header has a number of more than 64 bits")

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
