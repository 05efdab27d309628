"""Faults of single files in a folder that a user names: what is there instead of the file, and wrong content."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

Fault = Callable[[Path], None]


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _circle(path: Path) -> None:
    path.symlink_to(path.name)


def _content(content: bytes) -> Fault:
    def write(path: Path) -> None:
        path.write_bytes(content)

    return write


PLACES: dict[str, Fault] = {
    "a pipe": _pipe,
    "a link in a circle": _circle,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": Path.mkdir,
}
"""What may be there instead of any file."""

CONTENTS: dict[str, Fault] = {
    "empty": _content(b""),
    "cut off": _content(b'{"a": 1, "b": '),
    "a list": _content(b"[1, 2]"),
    "a number": _content(b"7"),
    "not UTF-8": _content(b'{"a": "\xff\xfe"}'),
    "nested": _content(b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "nested a little": _content(b'{"a": ' + b"[" * 400 + b"]" * 400 + b"}"),
    "NaN": _content(b'{"a": [NaN]}'),
    "infinite": _content(b'{"a": 1e999}'),
    "half a surrogate pair": _content(b'{"a": ["\\ud800"]}'),
    "two values of a key": _content(b'{"a": 1, "a": 2}'),
}
"""Content that no JSON file of a checkpoint may have."""

FAULTS = PLACES | CONTENTS


def spoil(path: Path, fault: str) -> None:
    """Replace a file, which may be missing, by a fault."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    FAULTS[fault](path)


VALUES: tuple[object, ...] = (
    "x", -1, 0, 10**7, 10**30, 1e308, True, [], {}, ["x"], {"x": 1}, [[[]]], "../../x", "a\0b", "x" * 20_000, 0.5,
)  # fmt: skip
"""Values of other types and out of range, to be set for any key."""
