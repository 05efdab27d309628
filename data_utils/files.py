"""Data files to records with their places: .json, .jsonl, .ndjson (also with .gz) and .parquet, or a folder of them.

What a file holds decides how it is read, not its name. Files are streamed: memory does not grow with them.
"""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_utils.json_stream import FORMAT, Location, json_records
from errors import DataError, one_line

if TYPE_CHECKING:
    import pyarrow

__all__ = ["SUFFIXES", "Location", "data_files", "read_records"]

logger = logging.getLogger(__name__)

_JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
SUFFIXES = (*_JSON_SUFFIXES, *(f"{suffix}.gz" for suffix in _JSON_SUFFIXES), ".parquet")
CHUNK_BYTES = 1 << 18

_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"
_BATCH_ROWS = 256
_LOGGED_NAMES = 5
# What values of a column raise where Python has nothing like them: a year 0, a time zone that is not known here, text
# that is not UTF-8, a map whose keys are objects.
_NOT_PLAIN = (ValueError, OverflowError, KeyError, TypeError)


def data_files(path: str | Path) -> list[Path]:
    """A file itself, or the data files of a folder and the folders in it, in the order of their names.

    Hidden files and folders are left out; other files, and links to folders, are too, and are logged.

    Raises:
        DataError: no such file, a folder that cannot be read or has no data files.
    """
    path = Path(path)
    try:
        if not path.is_dir():
            path.stat()
            return [path]
        files, ignored = _walk(path)
    except OSError as error:
        raise _cannot_read(Path(error.filename or path), error) from None
    if ignored:
        names = ", ".join(repr(str(file.relative_to(path))) for file in ignored[:_LOGGED_NAMES])
        more = ", ..." if len(ignored) > _LOGGED_NAMES else ""
        logger.info(f"{path}: ignored {len(ignored)} that are not data files: {names}{more}")
    if not files:
        raise DataError(str(path), "the folder has no data files", f"They end in {', '.join(SUFFIXES)}")
    return files


def _walk(root: Path) -> tuple[list[Path], list[Path]]:
    """Data files, and what is ignored."""
    files: list[Path] = []
    ignored: list[Path] = []
    for folder, folders, names in os.walk(root, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        ignored += (link for name in folders if (link := Path(folder, name)).is_symlink())
        for name in names:
            if not name.startswith("."):
                (files if name.lower().endswith(SUFFIXES) else ignored).append(Path(folder, name))
    return sorted(files), sorted(ignored)


def _raise(error: OSError) -> None:
    raise error


def read_records(path: str | Path, advance: Callable[[int], object] | None = None) -> Iterator[tuple[Location, object]]:
    """Read the records of a data file, each with its place.

    JSON is a list if it starts with ``[``, otherwise a value per line (blank lines are skipped). Rows of a table become
    objects; a column, or a member of one, that has no value in a row is left out of it.

    Args:
        path: one file.
        advance: called with the number of bytes of the file that have been read since the last call; together they are
            the file's size.

    Yields:
        A record's place and its value; a ``DataError`` in its stead where only this record cannot be read: a line that
        is broken, an object that has a key twice.

    Raises:
        DataError: a file that is missing, unreadable or without records, or a fault behind which nothing can be read.
    """
    path = Path(path)
    empty = True
    try:
        if path.is_dir():
            raise DataError(str(path), "is a folder", f"Name a file: {', '.join(SUFFIXES)}")
        with path.open("rb") as file:
            for record in _records(file, path, advance or _ignore):
                empty = False
                yield record
    except OSError as error:
        raise _cannot_read(path, error) from None
    if empty:
        raise DataError(str(path), "the file holds no conversations", FORMAT)


def _ignore(count: int) -> None:
    pass


def _cannot_read(path: Path, error: OSError) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(str(path), "no such file", "Check the path")
    return DataError(str(path), f"cannot be read ({error.strerror or error})")


def _records(file: BufferedReader, path: Path, advance: Callable[[int], object]) -> Iterator[tuple[Location, object]]:
    start = file.peek(len(_PARQUET))
    if start.startswith(_PARQUET):
        return _parquet_records(file, path, advance)
    chunks = _read_chunks(file, advance)
    if start.startswith(_GZIP):
        chunks = _unpack(chunks, path)
    elif start and path.suffix.lower() in (".gz", ".parquet"):
        what = f"its name ends in {path.suffix}, but that is not what it holds"
        raise DataError(str(path), what, "Download or write the file again, or name it after what it holds")
    return json_records(chunks, str(path))


def _read_chunks(file: BufferedReader, advance: Callable[[int], object]) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        advance(len(chunk))
        yield chunk


def _unpack(chunks: Iterator[bytes], path: Path) -> Iterator[bytes]:
    """The text of a gzip file, which may have several members, in pieces that are no larger than a chunk."""
    member = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    try:
        for packed in chunks:
            while packed:
                if member.eof:
                    packed = packed.lstrip(b"\0")  # which fill up a block of a tape
                    if not packed:
                        break
                    member = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
                if text := member.decompress(packed, CHUNK_BYTES):
                    yield text
                packed = member.unused_data or member.unconsumed_tail
    except zlib.error as error:
        raise _broken_gzip(path, one_line(error)) from None
    if not member.eof:
        raise _broken_gzip(path, "it ends in the middle")


def _broken_gzip(path: Path, what: str) -> DataError:
    return DataError(str(path), f"the gzip file is broken ({what})", "Download or pack it again")


def _parquet_records(
    file: BufferedReader, path: Path, advance: Callable[[int], object]
) -> Iterator[tuple[Location, object]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(str(path), f"a Parquet file needs pyarrow ({error})", "pip install pyarrow") from None
    size, reported, done = os.fstat(file.fileno()).st_size, 0, 0
    try:
        # Without buffers the library holds whole columns of a row group, or of the file.
        options = {"pre_buffer": False, "buffer_size": CHUNK_BYTES, "page_checksum_verification": True}
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
        what = f"the Parquet file cannot be read ({_shown(error)})"
        raise DataError(where, what, "Download or write it again") from None
    advance(size - reported)


def _check_columns(names: list[str], path: Path) -> None:
    for number, name in enumerate(names):
        if name in names[:number]:
            raise DataError(str(path), f"two columns have the name {name!r:.60}", "Rename one of them")


def _rows(batch: pyarrow.RecordBatch, path: Path, done: int) -> Iterator[dict[str, Any]]:
    names = batch.schema.names
    columns = []
    for field, column in zip(batch.schema, batch.columns, strict=True):
        try:
            values, make_plain = column.to_pylist(), _plain_maker(field.type)
            columns.append(values if make_plain is _as_it_is else [make_plain(value) for value in values])
        except _NOT_PLAIN as error:
            where = str(Location(str(path), record=done + 1))
            what = (
                f"the column {field.name!r:.60} cannot be read from here on ({type(error).__name__}: {_shown(error)})"
            )
            raise DataError(where, what, "Leave the column out, or write it as strings") from None
    for row in zip(*columns, strict=True):
        yield {name: value for name, value in zip(names, row, strict=True) if value is not None}


def _plain_maker(kind: pyarrow.DataType) -> Callable[[Any], Any]:
    """What turns a value of a column into plain JSON values.

    A struct always has all of its members, so one without a value was absent; a map has its own keys, and keeps them.
    """
    from pyarrow import types

    if types.is_struct(kind):
        members = {field.name: _plain_maker(field.type) for field in kind}
        return lambda value: value and {name: members[name](item) for name, item in value.items() if item is not None}
    if types.is_map(kind):
        of_item = _plain_maker(kind.item_type)
        return lambda value: None if value is None else _unique_keys([(key, of_item(item)) for key, item in value])
    if types.is_nested(kind) and hasattr(kind, "value_type"):
        of_value = _plain_maker(kind.value_type)
        return _as_it_is if of_value is _as_it_is else lambda value: value and [of_value(item) for item in value]
    return _as_it_is


def _unique_keys(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a map has a key more than once")
    return members


def _as_it_is(value: Any) -> Any:
    return value


def _shown(error: BaseException) -> str:
    """A library's complaint, which may quote the file."""
    return "".join(letter if letter.isprintable() else "?" for letter in one_line(error))
