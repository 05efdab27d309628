"""Single files of a checkpoint's, adapter's or run's folder: read with limits, written in one step; needs no torch."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from checkpoints.json_schemas import Schema, schema_of
from errors import ConfigError
from outputs import staged_file

_COPY_AGAIN = "Copy the file again"
_MOST_LEVELS = 100
"""Nested lists and objects: no file has as many, and Python and libraries fail at about 1,000."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read; a link to a file is followed.

    Raises:
        ConfigError: it is missing, or is a folder, a pipe, a device or a link that leads nowhere or in a circle.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # before it is opened: opening a pipe waits, a device may act
            raise ConfigError(f"{path} is {_kind_of(path)}, not a file", "Put the file itself there")
        return path.open("rb")
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"cannot read {path}: {describe_os_error(error)}", "Check the folder's name") from error


def check_regular(path: Path) -> None:
    """Raise ``ConfigError`` unless :func:`open_regular` can open a file."""
    open_regular(path).close()


def describe_os_error(error: Exception) -> str:
    """Return why the operating system, or Python before it (a name with NUL), refused a path."""
    return getattr(error, "strerror", None) or str(error)


def _kind_of(path: Path) -> str:
    mode = path.stat().st_mode
    kinds = {"a folder": stat.S_ISDIR, "a named pipe": stat.S_ISFIFO, "a socket": stat.S_ISSOCK}
    return next((kind for kind, applies in kinds.items() if applies(mode)), "a device")


def is_file(path: Path) -> bool:
    """Return whether a file is there; false for a name that no file can have.

    Raises:
        ConfigError: something else than a file is there, such as a pipe or a link in a circle.
    """
    try:
        path.lstat()
    except (OSError, ValueError):
        return False
    check_regular(path)
    return True


def read_text(path: Path, most_bytes: int, fix: str = _COPY_AGAIN) -> str:
    """Read a UTF-8 text file.

    Raises:
        ConfigError: see :func:`open_regular`; or it is too large, or not UTF-8.
    """
    with open_regular(path) as file:
        try:
            content = file.read(most_bytes + 1)
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}", fix) from error
    if len(content) > most_bytes:
        raise ConfigError(f"{path} is larger than {most_bytes:,} bytes, the limit for this file", fix)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 (byte {error.start:,})", fix) from error


def load_json(path: Path, schema: Schema | None = None) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        schema: its keys with their types and ranges; by default the one for the file's name, if it has one.

    Raises:
        ConfigError: the file is missing, is no regular file, too large, not UTF-8, no JSON object, nested too deeply,
            or a key does not follow the schema.
    """
    schema = schema or schema_of(path.name)
    fix = schema.fix or _COPY_AGAIN
    text = read_text(path, schema.most_bytes, fix)

    limits: dict[str, Any] = {} if schema.has_nan else {"parse_constant": _refuse_constant, "parse_float": _finite}
    try:
        value = json.loads(text, object_pairs_hook=_without_repeated_keys, **limits)
    except RecursionError as error:
        raise ConfigError(f"{path} is nested more than {_MOST_LEVELS} levels deep", fix) from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}", fix) from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a {type(value).__name__}, not a JSON object", fix)
    _check_values(value, path, has_surrogates=_SURROGATE.search(text) is not None)
    if fault := schema.rule.find_fault(value, ""):
        raise ConfigError(f"{path}: {fault}", schema.fix or "Copy it again from the original checkpoint")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it contains {name}")


def _finite(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"it contains {digits[:40]}, which is too large")
    return value


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object; a key that has two values means something else to each reader."""
    value = dict(pairs)
    if len(value) < len(pairs):
        for key, each in pairs:
            if value[key] != each:
                raise ValueError(f"the key {json.dumps(key)} has two values")
    return value


def _check_values(value: dict[str, Any], path: Path, has_surrogates: bool) -> None:
    """Check how deeply values are nested, and that texts are Unicode: half of a surrogate pair cannot be written."""
    level: list[Any] = [value]
    for _ in range(_MOST_LEVELS):
        if has_surrogates:
            for text in (each for parent in level for each in (*parent, *_children(parent))):
                if isinstance(text, str) and not _is_unicode(text):
                    what = f"{path} contains half of a surrogate pair in {json.dumps(text)[:60]}"
                    raise ConfigError(what, _COPY_AGAIN)
        level = [each for parent in level for each in _children(parent) if type(each) in (dict, list)]
        if not level:
            return
    raise ConfigError(f"{path} is nested more than {_MOST_LEVELS} levels deep", _COPY_AGAIN)


def _children(value: Any) -> Iterable[Any]:
    return value.values() if type(value) is dict else value


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def load_json_or_empty(path: Path) -> dict[str, Any]:
    """Read a JSON object; return ``{}`` if :func:`load_json` refuses it."""
    try:
        return load_json(path)
    except ConfigError:
        return {}


def json_text(value: Mapping[str, Any]) -> str:
    """Return a JSON object as it is written to files."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def save_json(value: Mapping[str, Any], path: Path) -> None:
    """Write a JSON object in one step (see :func:`outputs.staged_file`)."""
    save_text(json_text(value), path)


def save_text(text: str, path: Path) -> None:
    """Write a UTF-8 text file in one step (see :func:`outputs.staged_file`).

    What is no Unicode, as a file name in another encoding, is written as escapes, which JSON reads back.
    """
    save_bytes(text.encode(errors="backslashreplace"), path)


def save_bytes(content: bytes, path: Path) -> None:
    """Write a file in one step (see :func:`outputs.staged_file`)."""
    with staged_file(path) as staging:
        staging.write_bytes(content)
