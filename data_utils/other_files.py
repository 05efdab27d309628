"""Files that are often given as data and are not read: tables, archives, pickles. Each is refused with what to do."""

from __future__ import annotations

import codecs
from pathlib import Path

from errors import DataError

_TO_JSON = "Convert it with pandas: {reader}({name!r}).to_json('data.jsonl', orient='records', lines=True)"
_UNPACK = "Unpack it first; .gz files are read as they are"
_SAVE_AS = "Save the data as JSON lines (.jsonl) or Parquet where it was made"
_PICKLE = "a pickle, which can run code when it is opened", _SAVE_AS
ARROW_FIX = "Write it with its to_json('data.jsonl') or to_parquet('data.parquet')"
_ARROW = "an Arrow file of the datasets library", ARROW_FIX

# The first bytes of a file -> what it is, and what to do.
_STARTS: dict[bytes, tuple[str, str]] = {
    b"PK\x03\x04": ("a zip archive or an Excel table", "Unpack it, or save the table as CSV and convert that to JSON"),
    b"\xd0\xcf\x11\xe0": ("an old Excel or Word document", "Save the table as CSV, and convert that to JSON"),
    b"ARROW1": _ARROW,
    b"\xff\xff\xff\xff": _ARROW,
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", _UNPACK),
    b"BZh": ("compressed with bzip2", _UNPACK),
    b"\xfd7zXZ": ("compressed with xz", _UNPACK),
    b"7z\xbc\xaf": ("a 7z archive", _UNPACK),
    b"Obj\x01": ("an Avro file", _SAVE_AS),
    b"ORC": ("an ORC file", _SAVE_AS),
    b"PARE": ("an encrypted Parquet file", "Write it without encryption"),
    b"\x89HDF": ("an HDF5 file", _SAVE_AS),
    b"SQLite format 3": ("an SQLite database", _SAVE_AS),
    b"\x93NUMPY": ("a numpy array", _SAVE_AS),
    b"%PDF": ("a PDF document", _SAVE_AS),
    **{bytes([0x80, version]): _PICKLE for version in range(2, 6)},
}
_TEXT_FIX = "Name it .txt to train on it as plain text, or write conversations as JSON, one object per line"
# The ending of a text file -> what it is, and what to do.
_TEXTS: dict[str, tuple[str, str]] = {
    ".csv": ("a CSV table, not JSON", _TO_JSON.replace("{reader}", "read_csv")),
    ".tsv": ("a table, not JSON", _TO_JSON.replace("{reader}({name!r})", "read_csv({name!r}, sep='\\t')")),
    ".md": ("plain text, not JSON", _TEXT_FIX),
    ".yaml": ("YAML, not JSON", _SAVE_AS),
    ".yml": ("YAML, not JSON", _SAVE_AS),
    ".xml": ("XML, not JSON", _SAVE_AS),
    ".html": ("HTML, not JSON", _SAVE_AS),
    ".py": ("a program, not JSON", _SAVE_AS),
    ".pkl": _PICKLE,
    ".pickle": _PICKLE,
    ".pt": _PICKLE,
}
# Byte order marks; UTF-32 first, whose mark starts with that of UTF-16.
_OTHER_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip", ".rar", ".zst", ".bz2", ".xz", ".7z")
_TABLES = (".xlsx", ".xls", ".ods")


def check_kind(start: bytes, path: Path, name: str) -> None:
    """Check that a file, which is not Parquet, can be JSON or compressed JSON.

    Args:
        start: its first bytes, or those of its text if it is compressed; at least four if it has so many.
        name: its name, of which the ending counts.

    Raises:
        DataError: it is of another kind, by its first bytes, or by its name if it does not start like JSON.
    """
    name = name.lower()
    found = next((found for magic, found in _STARTS.items() if start.startswith(magic)), None)
    if found is None and name.endswith((".tar.gz", ".tgz")):
        found = "an archive", _UNPACK
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if found is None and text and not text.startswith((b"{", b"[", b"\x1f\x8b")):
        found = _TEXTS.get(Path(name).suffix)
        if found is None and name.endswith((*_ARCHIVES, *_TABLES)):
            found = ("a table" if name.endswith(_TABLES) else "an archive"), _SAVE_AS
    if found is not None:
        what, fix = found
        raise DataError(str(path), f"is {what}", fix.replace("{name!r}", repr(path.name)))


def check_encoding(start: bytes, path: str) -> None:
    """Check that a text does not begin with the byte order mark of another encoding than UTF-8.

    Raises:
        DataError: it does.
    """
    for mark, encoding in _OTHER_ENCODINGS.items():
        if start.startswith(mark):
            raise DataError(path, f"the file is {encoding}, not UTF-8", "Save the file as UTF-8")
