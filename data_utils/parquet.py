"""Read the rows of a Parquet file, batch by batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from console import pip_command
from data_utils.json_stream import Location
from errors import DataError, one_line

if TYPE_CHECKING:
    import pyarrow

_BATCH_ROWS = 256
_BUFFER_BYTES = 1 << 18
# Raised for values that Python cannot represent: a year 0, an unknown time zone, text that is not UTF-8, a map whose
# keys are objects.
_CONVERSION_ERRORS = (ValueError, OverflowError, KeyError, TypeError)


def parquet_records(
    file: BufferedReader, path: Path, advance: Callable[[int], object]
) -> Iterator[tuple[Location, object]]:
    """Yield the rows of a Parquet file as objects of plain values, each with its location. Null columns are left out.

    Args:
        advance: called with the estimated bytes read since the last call; the sum of all calls is the file's size.

    Raises:
        DataError: pyarrow is missing, the file is broken, or a column cannot be converted.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(str(path), f"a Parquet file needs pyarrow ({error})", pip_command("pyarrow")) from None
    size, reported, done = os.fstat(file.fileno()).st_size, 0, 0  # bytes, bytes, rows
    try:
        # Unbuffered, pyarrow loads whole columns of a row group, or of the file.
        options = {"pre_buffer": False, "buffer_size": _BUFFER_BYTES, "page_checksum_verification": True}
        with parquet.ParquetFile(file, **options) as table:
            rows = table.metadata.num_rows
            _check_columns(table.schema_arrow.names, path)
            for batch in table.iter_batches(_BATCH_ROWS, use_threads=False):
                for row in _rows(batch, path, done):
                    done += 1
                    yield Location(str(path), record=done), row
                reached = size * done // max(rows, done)
                advance(reached - reported)
                reported = reached
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        where = str(Location(str(path), record=done + 1)) if done else str(path)
        what = f"the Parquet file cannot be read ({_printable(error)})"
        raise DataError(where, what, "Download or write it again") from None
    advance(size - reported)


def _check_columns(names: list[str], path: Path) -> None:
    for number, name in enumerate(names):
        if name in names[:number]:
            raise DataError(str(path), f"two columns are named {name!r:.60}", "Rename one of them")


def _rows(batch: pyarrow.RecordBatch, path: Path, done: int) -> Iterator[dict[str, Any]]:
    names = batch.schema.names
    columns = []
    for field, column in zip(batch.schema, batch.columns, strict=True):
        try:
            values, convert = column.to_pylist(), _converter(field.type)
            columns.append(values if convert is _identity else [convert(value) for value in values])
        except _CONVERSION_ERRORS as error:
            where = str(Location(str(path), record=done + 1))
            what = f"the column {field.name!r:.60} cannot be read from this record on"
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
