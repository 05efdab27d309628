"""Read records with their locations from data files (``SUFFIXES``), or a folder of them.

The content of a file decides how it is read, not its name, except for plain text. Files are streamed: memory does not
grow with their size.
"""

from __future__ import annotations

import itertools
import logging
import os
import stat
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from io import BufferedReader
from pathlib import Path

from data_utils.json_stream import FORMAT, json_records
from data_utils.location import Location
from data_utils.other_files import ARROW_FIX, check_kind
from data_utils.parquet import parquet_records
from data_utils.text_file import is_text_file, text_records
from errors import DataError, one_line

__all__ = ["SUFFIXES", "Location", "data_files", "read_records"]

logger = logging.getLogger(__name__)

_JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
_TEXT_SUFFIXES = (".txt", ".txt.gz")
SUFFIXES = (*_JSON_SUFFIXES, *(f"{suffix}.gz" for suffix in _JSON_SUFFIXES), ".parquet", *_TEXT_SUFFIXES)
CHUNK_BYTES = 1 << 18

TextReader = Callable[[Iterator[bytes], str], Iterator[tuple[Location, object]]]

_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"
_SAVED_DATASET = ("dataset_info.json", "state.json", "dataset_dict.json")  # beside .arrow files
_LOGGED_NAMES = 5
_MOST_PEEKED = 4096


def data_files(path: str | Path) -> list[Path]:
    """Return a file itself, or the data files in a folder and its subfolders, sorted by path.

    Hidden files and folders are ignored. Other files and links to folders are ignored and logged; so are texts beside
    files of other kinds, which are most often about the data.

    Raises:
        DataError: no such file; one that is no regular file; a folder that cannot be read or contains no data files.
    """
    path = Path(path)
    if not stat.S_ISDIR(check_readable(path)):
        return [path]
    try:
        files, ignored = _walk(path)
    except OSError as error:
        raise _cannot_read(Path(error.filename or path), error) from None
    texts = [file for file in files if file.name.lower().endswith(_TEXT_SUFFIXES)]
    if 0 < len(texts) < len(files):
        logger.warning(f"{path}: left out {_names(texts, path)}, beside other data. Name a text file to train on it")
        files = [file for file in files if file not in texts]
    for file in files:
        check_readable(file)
    if any(file.suffix == ".arrow" for file in ignored) and all(file.name in _SAVED_DATASET for file in files):
        raise DataError(str(path), "is a data set saved by the datasets library", ARROW_FIX)
    if ignored:
        logger.info(f"{path}: ignored {len(ignored)} entries that are not data files: {_names(ignored, path)}")
    if not files:
        raise DataError(str(path), "the folder contains no data files", f"Their names end in {', '.join(SUFFIXES)}")
    return files


def _names(files: Sequence[Path], folder: Path) -> str:
    names = ", ".join(repr(str(file.relative_to(folder))) for file in files[:_LOGGED_NAMES])
    return names + (", ..." if len(files) > _LOGGED_NAMES else "")


def check_readable(path: Path) -> int:
    """Check that a path is a regular file or a folder, and return its mode. Nothing is opened.

    Raises:
        DataError: no such file, or one that cannot be read twice, such as a pipe.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise _cannot_read(path, error) from None
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise _no_regular_file(path, mode)
    return mode


def _no_regular_file(path: Path, mode: int) -> DataError:
    kinds = {"a pipe": stat.S_ISFIFO, "a socket": stat.S_ISSOCK}
    kind = next((name for name, is_kind in kinds.items() if is_kind(mode)), "a device")
    return DataError(
        str(path),
        f"is {kind}, not a file, and data is read twice",
        "Write the data to a file first (COMMAND > data.jsonl), and name that",
    )


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


def read_records(
    path: str | Path,
    advance: Callable[[int], object] | None = None,
    fields: Collection[str] | None = None,
    parses_lines: bool = True,
    is_text: bool = False,
    read_text: TextReader = text_records,
) -> Iterator[tuple[Location, object]]:
    """Read the records of a data file, each with its location.

    A .txt file is one document, in parts. JSON that starts with ``[`` is one list; otherwise there is one value per
    line, and blank lines are skipped. Table rows become objects without their null columns and null struct members.

    Args:
        path: one file.
        fields: columns of a table that are read; ``None``, or a table without any of them, reads all.
        advance: called with the bytes of the file read since the last call; the sum of all calls is the file's size.
        parses_lines: see ``json_records``.
        is_text: a .txt file is plain text, even if it begins like JSON.
        read_text: what becomes of plain text: yields records from its bytes and the name of its file.

    Yields:
        The location and the value of a record. If only this record cannot be read (a broken line, a repeated key), its
        value is a ``DataError``.

    Raises:
        DataError: the file is missing, unreadable or without records, or nothing after a fault can be read.
    """
    path = Path(path)
    empty = True
    if stat.S_ISDIR(check_readable(path)):
        raise DataError(str(path), "is a folder", f"Name a file: {', '.join(SUFFIXES)}")
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise _no_regular_file(path, mode)
            for record in _records(file, path, advance or _ignore, fields, parses_lines, is_text, read_text):
                empty = False
                yield record
    except OSError as error:
        raise _cannot_read(path, error) from None
    if empty:
        raise DataError(str(path), "the file contains no conversations", FORMAT)


def _ignore(count: int) -> None:
    pass


def _open_at_once(path: str, flags: int) -> int:
    """Open a file without waiting for the writer of a pipe that has taken its place."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _cannot_read(path: Path, error: OSError | ValueError) -> DataError:
    if isinstance(error, FileNotFoundError):
        if path.is_symlink():
            return DataError(str(path), "is a link to a file that does not exist", "Check the link")
        return DataError(str(path), "no such file", "Check the path")
    return DataError(str(path), f"cannot be read ({getattr(error, 'strerror', None) or error})")


def _records(
    file: BufferedReader,
    path: Path,
    advance: Callable[[int], object],
    fields: Collection[str] | None,
    parses_lines: bool,
    is_text: bool,
    read_text: TextReader,
) -> Iterator[tuple[Location, object]]:
    start = file.peek(len(_PARQUET))
    if start.startswith(_PARQUET):
        return parquet_records(file, path, advance, fields)
    check_kind(start, path, path.name)
    chunks, name = _read_chunks(file, advance), path.name
    if start.startswith(_GZIP):
        chunks, name = _unpack(chunks, path), path.name.removesuffix(".gz")
        first = next(chunks, b"")
        start = first[:_MOST_PEEKED]
        check_kind(start, path, name)
        chunks = itertools.chain([first] if first else [], chunks)
    elif start and path.suffix.lower() in (".gz", ".parquet"):
        kind = "gzip" if path.suffix.lower() == ".gz" else "Parquet"
        what = f"the name ends in {path.suffix}, but the content is not a {kind} file"
        raise DataError(str(path), what, "Download or write the file again, or rename it")
    if is_text_file(name, start, is_text):
        return read_text(chunks, str(path))
    return json_records(chunks, str(path), parses_lines)


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
