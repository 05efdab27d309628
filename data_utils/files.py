"""Read records with their locations from .json, .jsonl, .ndjson (also .gz) and .parquet files, or a folder of them.

The content of a file decides how it is read, not its name. Files are streamed: memory does not grow with their size.
"""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path

from data_utils.json_stream import FORMAT, Location, json_records
from data_utils.parquet import parquet_records
from errors import DataError, one_line

__all__ = ["SUFFIXES", "Location", "data_files", "read_records"]

logger = logging.getLogger(__name__)

_JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
SUFFIXES = (*_JSON_SUFFIXES, *(f"{suffix}.gz" for suffix in _JSON_SUFFIXES), ".parquet")
CHUNK_BYTES = 1 << 18

_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"
_LOGGED_NAMES = 5


def data_files(path: str | Path) -> list[Path]:
    """Return a file itself, or the data files in a folder and its subfolders, sorted by path.

    Hidden files and folders are ignored. Other files and links to folders are ignored and logged.

    Raises:
        DataError: no such file; a folder that cannot be read or contains no data files.
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
        logger.info(f"{path}: ignored {len(ignored)} entries that are not data files: {names}{more}")
    if not files:
        raise DataError(str(path), "the folder contains no data files", f"Their names end in {', '.join(SUFFIXES)}")
    return files


def _walk(root: Path) -> tuple[list[Path], list[Path]]:
    """Return the data files and the ignored entries."""
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
    """Read the records of a data file, each with its location.

    JSON that starts with ``[`` is one list; otherwise there is one value per line, and blank lines are skipped. Table
    rows become objects without their null columns and null struct members.

    Args:
        path: one file.
        advance: called with the bytes of the file read since the last call; the sum of all calls is the file's size.

    Yields:
        The location and the value of a record. If only this record cannot be read (a broken line, a repeated key), its
        value is a ``DataError``.

    Raises:
        DataError: the file is missing, unreadable or without records, or nothing after a fault can be read.
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
        raise DataError(str(path), "the file contains no conversations", FORMAT)


def _ignore(count: int) -> None:
    pass


def _cannot_read(path: Path, error: OSError) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(str(path), "no such file", "Check the path")
    return DataError(str(path), f"cannot be read ({error.strerror or error})")


def _records(file: BufferedReader, path: Path, advance: Callable[[int], object]) -> Iterator[tuple[Location, object]]:
    start = file.peek(len(_PARQUET))
    if start.startswith(_PARQUET):
        return parquet_records(file, path, advance)
    chunks = _read_chunks(file, advance)
    if start.startswith(_GZIP):
        chunks = _unpack(chunks, path)
    elif start and path.suffix.lower() in (".gz", ".parquet"):
        kind = "gzip" if path.suffix.lower() == ".gz" else "Parquet"
        what = f"the name ends in {path.suffix}, but the content is not a {kind} file"
        raise DataError(str(path), what, "Download or write the file again, or rename it")
    return json_records(chunks, str(path))


def _read_chunks(file: BufferedReader, advance: Callable[[int], object]) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        advance(len(chunk))
        yield chunk


def _unpack(chunks: Iterator[bytes], path: Path) -> Iterator[bytes]:
    """Yield the text of a gzip file, which may have several members, in pieces of at most ``CHUNK_BYTES``."""
    member = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    try:
        for packed in chunks:
            while packed:
                if member.eof:
                    packed = packed.lstrip(b"\0")  # padding to a full block, as on tapes
                    if not packed:
                        break
                    member = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
                if text := member.decompress(packed, CHUNK_BYTES):
                    yield text
                packed = member.unused_data or member.unconsumed_tail
    except zlib.error as error:
        raise _broken_gzip(path, one_line(error)) from None
    if not member.eof:
        raise _broken_gzip(path, "unexpected end of the file")


def _broken_gzip(path: Path, what: str) -> DataError:
    return DataError(str(path), f"the gzip file is broken ({what})", "Download or pack it again")
