"""Folders that a user names as input: their files are checked before anything in them is used; needs no torch.

Libraries open some of the files themselves, wait for a pipe without end, and fail in their own ways for a value that
they do not expect. So every command checks all files at once, when it opens a folder.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from checkpoints.companions import check_inside, is_companion
from checkpoints.files import check_regular, describe_os_error, load_json, read_text
from checkpoints.folder_kind import fix_for_no_model
from checkpoints.json_schemas import MIB, SCHEMAS
from checkpoints.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, TEMPLATES_FOLDER
from errors import ConfigError

_MOST_TEXT = 64 * MIB
# Text files beside the JSON files, and files that only have to be regular ones.
_TEXTS = (".jinja", ".tiktoken", "merges.txt")
_OTHERS = (".safetensors", ".bin", ".pt", ".pth", ".jsonl", ".model", ".yaml")
_checked: set[tuple[object, ...]] = set()  # versions of large files that have been checked


def check_name(name: str | Path, flag: str) -> None:
    """Raise ``ConfigError`` for a name that cannot be written into the JSON files of a run, or is no name at all."""
    try:
        name_text = str(name)
        name_text.encode()
    except UnicodeEncodeError:
        what = f"{flag} {os.fsencode(name)!r}: the name is not UTF-8"
        raise ConfigError(what, "Rename the file or folder") from None
    if not name_text.strip() or "\0" in name_text:
        raise ConfigError(f"{flag} {name_text!r} is not a name", "Give the name of a folder")


def check_files(folder: Path) -> None:
    """Check the files of a folder that this toolkit or its libraries read.

    Raises:
        ConfigError: the folder cannot be listed; or it contains a pipe or a device, a JSON file that does not follow
            its schema (see :mod:`checkpoints.json_schemas`), a text that is not UTF-8 or too large, or a link to a
            place outside of it, other than weights.
    """
    try:
        with os.scandir(folder) as listing:
            entries = sorted((Path(entry.path), entry.name) for entry in listing)
    except (OSError, ValueError) as error:
        what = f"cannot read the folder {folder}: {describe_os_error(error)}"
        raise ConfigError(what, "Check the folder's name and permissions") from error
    for path, name in entries:
        if name == TEMPLATES_FOLDER or name in SCHEMAS or name.endswith(_TEXTS) or is_companion(name):
            check_inside(path, folder)
        if name == TEMPLATES_FOLDER and path.is_dir():
            check_files(path)
        elif name in SCHEMAS:
            _check_json(path)
        elif name.endswith(_TEXTS):
            read_text(path, _MOST_TEXT)
        elif name.endswith(_OTHERS) or _is_special(path):
            check_regular(path)


def _check_json(path: Path) -> None:
    """Check a JSON file by its schema; a large one, such as a vocabulary, again only after it has changed."""
    check_regular(path)
    state = path.stat()
    version = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, path.name)
    if version not in _checked:
        load_json(path)
        if state.st_size >= MIB:
            _checked.add(version)


def check_model_files(folder: Path) -> None:
    """Check the files of a model's folder.

    Raises:
        ConfigError: see :func:`check_files`; or the folder contains an adapter too, which transformers would apply to
            the model, and other programs would not.
    """
    check_files(folder)
    if os.path.lexists(folder / ADAPTER_CONFIG):
        weights = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")]
        if all(path.name in ADAPTER_WEIGHTS for path in weights):
            raise ConfigError(f"{folder} contains no weights of a model", fix_for_no_model(folder, ""))
        what = f"{folder} contains a model and an adapter ({ADAPTER_CONFIG})"
        fix = f"Move {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS[0]} to a folder of their own, and name it as the adapter"
        raise ConfigError(what, fix)


def _is_special(path: Path) -> bool:
    """Return whether a path is neither a file, a folder nor a link that leads nowhere."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
