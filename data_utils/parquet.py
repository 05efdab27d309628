"""Read the rows of a Parquet file, batch by batch, with a limit for a row and for the memory of a batch."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from console import pip_command
from data_utils import json_stream
from data_utils.location import Location
from data_utils.parquet_limits import (
    PLAIN_WIDTH,
    Chunk,
    TooLarge,
    check_chunks,
    check_text_size,
    leaf_arrays,
    longest_entry,
    rows_at_once,
    value_sizes,
)
from data_utils.parquet_pages import PageError, chunk_sizes
from data_utils.schema import short_repr
from errors import DataError, one_line

if TYPE_CHECKING:
    import pyarrow
    from pyarrow import parquet

    from data_utils.parquet_limits import Sizes

_BATCH_ROWS = 256
_BUFFER_BYTES = 1 << 18
# Raised for values that Python cannot represent: a year 0, an unknown time zone, text that is not UTF-8, a map whose
# keys are objects.
_CONVERSION_ERRORS = (ValueError, OverflowError, KeyError, TypeError)
_PREFIXES = "DELTA_BYTE_ARRAY"
_NO_INDICES = (_PREFIXES, "DELTA_LENGTH_BYTE_ARRAY")  # pyarrow cannot read these encodings as a dictionary

OpenTable = Callable[..., Any]
"""Open the file as a ``pyarrow.parquet.ParquetFile``; keywords are added."""

Records = Iterator[tuple[Location, object]]


def parquet_records(
    file: BufferedReader, path: Path, advance: Callable[[int], object], fields: Collection[str] | None = None
) -> Records:
    """Yield the rows of a Parquet file as objects of plain values, each with its location. Null columns are left out.

    A row that is larger than the largest record is a ``DataError``.

    Args:
        advance: called with the estimated bytes read since the last call; the sum of all calls is the file's size.
        fields: the columns to read; ``None``, or none of the file's columns, reads all.

    Raises:
        DataError: pyarrow is missing, the file is broken, a column cannot be converted, or a row group could take much
            more memory than its size.
    """
    try:
        import numpy as np
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(str(path), f"a Parquet file needs pyarrow ({error})", pip_command("pyarrow")) from None
    size, reported, text = os.fstat(file.fileno()).st_size, 0, 0  # bytes
    done, group = 0, 0  # rows, row groups
    # Unbuffered, pyarrow loads whole columns of a row group, or of the file.
    options = {"pre_buffer": False, "buffer_size": _BUFFER_BYTES, "page_checksum_verification": True}
    try:
        with parquet.ParquetFile(file, **options) as table:
            metadata, columns = table.metadata, _columns(table, fields, path)
        open_table = partial(parquet.ParquetFile, file, metadata=metadata, **options)
        for group in range(metadata.num_row_groups):
            if not metadata.row_group(group).num_rows:
                continue
            rows, indices = _plan(open_table, group, columns.leaves, file.fileno())
            with open_table(read_dictionary=indices) as table:
                for batch in table.iter_batches(rows, [group], columns.names, use_threads=False):
                    sizes = sum((value_sizes(column) for column in batch.columns), np.zeros(batch.num_rows, np.int64))
                    text += int(sizes.sum())
                    check_text_size(text, size)
                    yield from _records(batch, sizes, path, done)
                    done += batch.num_rows
                    reached = size * done // max(metadata.num_rows, done)
                    advance(reached - reported)
                    reported = reached
    except TooLarge as error:
        fix = "Write the table with smaller row groups and pages, or as JSON lines, if the data is really so large"
        raise DataError(f"{path} (row group {group + 1})", f"could take too much memory: {error}", fix) from None
    except (pyarrow.ArrowException, PageError, OSError, UnicodeDecodeError) as error:
        where = str(Location(str(path), record=done + 1)) if done else str(path)
        what = f"the Parquet file cannot be read ({_printable(error)})"
        raise DataError(where, what, "Download or write it again") from None
    advance(size - reported)


# -------------------------------------------------------------------------------------------------------------- columns


class _Leaf(NamedTuple):
    """A column of plain values, which may lie within one with lists and structs.

    Attributes:
        name: of its column.
        number: among the file's leaves, from 0.
        path: its name in the file.
        is_nested: see ``Chunk``.
        is_text: text or bytes of any length.
        width: see ``Chunk``.
    """

    name: str
    number: int
    path: str
    is_nested: bool
    is_text: bool
    width: int


class _Columns(NamedTuple):
    """The columns that are read, and their leaves."""

    names: list[str]
    leaves: list[_Leaf]


def _columns(table: parquet.ParquetFile, fields: Collection[str] | None, path: Path) -> _Columns:
    schema, metadata = table.schema_arrow, table.metadata
    names = [name for name in schema.names if fields is None or name in fields] or list(schema.names)
    repeated = next((name for name, count in Counter(names).items() if count > 1), None)
    if repeated is not None:
        raise DataError(str(path), f"two columns are named {short_repr(repeated)}", "Rename one of them")
    leaves: list[_Leaf] = []
    index, used = 0, set(names)
    for field in schema:
        fixed = _fixed_lists(field.type)
        if field.name in used:
            leaves += (_leaf(field.name, index + offset, sizes, metadata) for offset, sizes in enumerate(fixed))
        index += len(fixed)
    return _Columns(names, leaves)


def _leaf(name: str, index: int, fixed: Sequence[int], metadata: Any) -> _Leaf:
    column = metadata.schema.column(index)
    is_text = column.physical_type == "BYTE_ARRAY"
    width = column.length if column.physical_type == "FIXED_LEN_BYTE_ARRAY" else PLAIN_WIDTH
    is_nested = column.max_repetition_level > len(fixed)
    return _Leaf(name, index, column.path, is_nested, is_text, max(1, width) * math.prod(fixed))


def _fixed_lists(type_: pyarrow.DataType, outer: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    """Return, for each leaf of a type, the lengths of the fixed-size lists that contain it."""
    import pyarrow
    from pyarrow import types

    if isinstance(type_, pyarrow.BaseExtensionType):
        return _fixed_lists(type_.storage_type, outer)
    if types.is_struct(type_):
        return [leaf for field in type_ for leaf in _fixed_lists(field.type, outer)]
    if types.is_map(type_):
        return _fixed_lists(type_.key_type, outer) + _fixed_lists(type_.item_type, outer)
    if types.is_fixed_size_list(type_):
        return _fixed_lists(type_.value_type, (*outer, type_.list_size))
    if types.is_nested(type_) and hasattr(type_, "value_type"):
        return _fixed_lists(type_.value_type, outer)
    return [outer]


def _plan(open_table: OpenTable, group: int, leaves: Sequence[_Leaf], descriptor: int) -> tuple[int, list[str]]:
    """Return how many rows of a row group may be read at once, and which leaves as indices into their dictionary.

    Raises:
        TooLarge: the row group must not be read.
    """
    with open_table() as table:
        row_group = table.metadata.row_group(group)
    chunks, doubtful = [], []
    for leaf in leaves:
        column = row_group.column(leaf.number)
        start, first = column.data_page_offset, column.dictionary_page_offset
        start = min(start, first) if first else start
        sizes = chunk_sizes(descriptor, start, column.total_compressed_size)
        has_prefixes, entry = leaf.is_text and _PREFIXES in column.encodings, sizes.dictionary if leaf.is_text else 0
        chunks.append(Chunk(leaf.name, sizes, leaf.is_nested, has_prefixes, leaf.width, entry))
        if chunks[-1].expands() and set(column.encodings).isdisjoint(_NO_INDICES):
            doubtful.append(leaf)
    check_chunks(chunks)
    by_number = dict(zip((leaf.number for leaf in leaves), chunks, strict=True))
    for leaf, length in _longest_entries(open_table, group, leaves, doubtful):
        by_number[leaf.number].entry = length
    indices = [leaf for leaf in doubtful if by_number[leaf.number].expands()]
    for leaf in indices:
        by_number[leaf.number].entry = 0
    return rows_at_once(chunks, _BATCH_ROWS), [leaf.path for leaf in indices]


def _longest_entries(
    open_table: OpenTable, group: int, leaves: Sequence[_Leaf], doubtful: Sequence[_Leaf]
) -> Iterator[tuple[_Leaf, int]]:
    """Yield some of the leaves with the length of the longest text in their dictionary: read with the first row."""
    names = list(dict.fromkeys(leaf.name for leaf in doubtful))
    if not names:
        return
    wanted = {leaf.number for leaf in doubtful}
    with open_table(read_dictionary=[leaf.path for leaf in doubtful]) as table:
        batch = next(table.iter_batches(1, [group], names, use_threads=False))
    for name in names:
        arrays = leaf_arrays(batch.column(batch.schema.get_field_index(name)))
        of_column = (leaf for leaf in leaves if leaf.name == name)
        yield from (
            (leaf, longest_entry(array)) for leaf, array in zip(of_column, arrays, strict=True) if leaf.number in wanted
        )


# ----------------------------------------------------------------------------------------------------------------- rows


def _records(batch: pyarrow.RecordBatch, sizes: Sizes, path: Path, done: int) -> Records:
    """Yield the rows of a batch; as Python objects there are never more than those of the largest record.

    Args:
        sizes: of its rows.
        done: rows before it in the file.
    """
    import numpy as np

    limit = json_stream.MAX_RECORD_BYTES
    start = 0
    while start < batch.num_rows:
        location = Location(str(path), record=done + start + 1)
        if sizes[start] > limit:
            what = f"the record has more than {limit / 2**20:g} MiB of text"
            yield location, DataError(str(location), what, "Check the file, or split the record")
            start += 1
            continue
        count = int(np.searchsorted(np.cumsum(sizes[start:]), limit, side="right"))
        rows = _rows(batch.slice(start, count), path, done + start)
        yield from ((location._replace(record=done + number), row) for number, row in enumerate(rows, start + 1))
        start += count


def _rows(batch: pyarrow.RecordBatch, path: Path, done: int) -> Iterator[dict[str, Any]]:
    names = batch.schema.names
    columns = []
    for field, column in zip(batch.schema, batch.columns, strict=True):
        try:
            values, convert = column.to_pylist(), _converter(field.type)
            columns.append(values if convert is _identity else [convert(value) for value in values])
        except _CONVERSION_ERRORS as error:
            where = str(Location(str(path), record=done + 1))
            what = f"the column {short_repr(field.name)} cannot be read from this record on"
            reason = f"{type(error).__name__}: {_printable(error)}"
            raise DataError(where, f"{what} ({reason})", "Leave the column out, or write it as strings") from None
    for row in zip(*columns, strict=True):
        yield {name: value for name, value in zip(names, row, strict=True) if value is not None}


def _converter(type_: pyarrow.DataType) -> Callable[[Any], Any]:
    """Return a function that converts a column's values to plain JSON values.

    Null members of a struct are left out: a struct has all members of its type, so they were absent. A map keeps its
    null values.
    """
    from pyarrow import types

    if types.is_struct(type_):
        members = {field.name: _converter(field.type) for field in type_}
        return lambda value: value and {name: members[name](item) for name, item in value.items() if item is not None}
    if types.is_map(type_):
        convert_item = _converter(type_.item_type)
        return lambda value: None if value is None else _unique_keys([(key, convert_item(item)) for key, item in value])
    if types.is_nested(type_) and hasattr(type_, "value_type"):
        convert_item = _converter(type_.value_type)
        if convert_item is not _identity:
            return lambda value: value and [convert_item(item) for item in value]
    return _identity


def _unique_keys(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a map has a repeated key")
    return members


def _identity(value: Any) -> Any:
    return value


def _printable(error: BaseException) -> str:
    """Return a library's message, which may quote the file, as one printable line."""
    return "".join(letter if letter.isprintable() else "?" for letter in one_line(error))
