"""The chat template that a command uses: a file of the user, else that of an adapter, else the checkpoint's."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoints.base_files import TOKENIZER_CONFIG, Files, read_tokenizer, set_values, values_of
from checkpoints.files import read_text
from checkpoints.names import TEMPLATES_FOLDER
from errors import ConfigError

logger = logging.getLogger(__name__)

FLAG = "--chat_template"
_MOST_BYTES = 1 << 20
_FILE = "chat_template.jinja"


def read_chat_template(file: str) -> str:
    """Read the file of ``--chat_template``.

    Raises:
        ConfigError: it is missing, no text, empty, or JSON.
    """
    path, fix = Path(file).expanduser(), "Give a file with the template's text"
    if path.is_dir():
        inside = path / _FILE
        raise ConfigError(f"{FLAG} {file} is a folder", f"Give {inside}" if inside.is_file() else fix)
    try:
        text = read_text(path, _MOST_BYTES, fix).removeprefix("\ufeff")
    except ConfigError as error:
        raise ConfigError(f"{FLAG}: {error}") from None
    if not text.strip():
        raise ConfigError(f"{FLAG} {file} is empty", "Write a Jinja template, or leave the flag out")
    if "\0" in text:
        raise ConfigError(f"{FLAG} {file} contains a zero byte, so it is no text", fix)
    try:
        is_json = isinstance(json.loads(text), (dict, list, str))
    except (ValueError, RecursionError):
        is_json = False
    if is_json:
        raise ConfigError(f"{FLAG} {file} is JSON, not a template", 'Put the text of its "chat_template" into a file')
    return text


def adapters_template(folders: Sequence[str], current: object) -> str | None:
    """Return the chat template that adapters were trained with, if it is another than the checkpoint's.

    Args:
        folders: of adapters; those without a tokenizer do not count.
        current: the checkpoint's template, or its templates by name.

    Raises:
        ConfigError: two adapters with different templates.
    """
    found: dict[str, str] = {}
    for folder in folders:
        if (text := _template_of(read_tokenizer([Path(folder).expanduser()]))) is not None:
            found[folder] = text
    if not found:
        return None
    first, *others = found
    for other in others:
        if not _are_equal(found[other], found[first]):
            what = f"the adapters in {first} and {other} were trained with different chat templates"
            raise ConfigError(what, f"Load them one at a time, or give {FLAG}")
    if _are_equal(found[first], current.get("default") if isinstance(current, dict) else current):
        return None
    logger.info("the chat template is that of the adapter in %s, which differs from the checkpoint's", first)
    return found[first]


def _template_of(files: Files) -> str | None:
    if _FILE in files:
        return files[_FILE].decode(errors="replace")
    inline: Any = values_of(files, TOKENIZER_CONFIG).get("chat_template")
    return inline if isinstance(inline, str) else None


def _are_equal(one: object, other: object) -> bool:
    """Compare templates; Jinja drops the end of the last line."""
    return str(one).removesuffix("\n") == str(other).removesuffix("\n")


def replace_chat_template(files: Files, text: str) -> None:
    """Make a template the only one among a checkpoint's files, so that a result is used as it was trained."""
    for name in [name for name in files if name.startswith((_FILE, "chat_template.json", TEMPLATES_FOLDER))]:
        del files[name]
    settings = values_of(files, TOKENIZER_CONFIG)
    if settings.pop("chat_template", None) is not None:
        set_values(files, TOKENIZER_CONFIG, settings)
    files[_FILE] = text.encode(errors="surrogatepass")
