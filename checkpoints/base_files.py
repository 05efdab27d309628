"""Files beside the weights of a base or an adapter, kept as they are in the folders that are made from it.

They are read into memory, changed where stated, and written, so that the end of a long run does not depend on the
base's folder. A file whose values do not change keeps its bytes. No library saves a tokenizer or config here: each
rewrites them in its own form, which other versions read differently or not at all. Needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoints.companions import PROCESSOR_FILES, find_companion
from checkpoints.files import json_text, save_bytes
from checkpoints.names import TEMPLATES_FOLDER

Files = dict[str, bytes]
"""Contents by name; a name may contain the folder of named chat templates."""

CONFIG, GENERATION_CONFIG, TOKENIZER_CONFIG = "config.json", "generation_config.json", "tokenizer_config.json"

# Files that belong together come from one folder.
_GROUPS = (
    (TOKENIZER_CONFIG, "special_tokens_map.json"),
    ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json"),
    ("qwen.tiktoken", "qwen_extra.tiktoken"),
)
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")


def read_base_files(base: Path, adapters: Sequence[Path] = ()) -> Files:
    """Return the base's config and processors; settings and tokenizer of the first adapter with them, else the base's.

    Raises:
        ConfigError: a link that leads out of a folder.
    """
    sources = [*adapters, base]
    settings = _first(_read(source, [GENERATION_CONFIG]) for source in sources)
    return _read(base, [CONFIG, *PROCESSOR_FILES]) | settings | read_tokenizer(sources)


def read_tokenizer(sources: Sequence[Path]) -> Files:
    """Return the tokenizer's files, each group from the first of ``sources`` that has one of its files.

    Changed in ``tokenizer_config.json``: ``auto_map`` is left out, because code is not copied; its chat templates are
    those of the first source that has any, in whichever file, because libraries disagree which file takes precedence.

    Raises:
        ConfigError: a link that leads out of a folder.
    """
    files: Files = {}
    for group in _GROUPS:
        files |= _first(_read(source, group) for source in sources)
    inline = None
    for source in sources:
        templates = _read(source, (*_TEMPLATE_FILES, *_named_templates(source)))
        inline = values_of(_read(source, [TOKENIZER_CONFIG]), TOKENIZER_CONFIG).get("chat_template")
        if templates or inline:
            files |= templates
            break
    if TOKENIZER_CONFIG not in files:
        return files
    settings = values_of(files, TOKENIZER_CONFIG)
    if extra := settings.get("extra_vocab_file"):
        files |= _first(_read(source, [Path(extra).name]) for source in sources)
    changed = {name: value for name, value in settings.items() if name != "auto_map"}
    if inline:
        changed["chat_template"] = inline
    elif changed.get("chat_template"):
        del changed["chat_template"]
    set_values(files, TOKENIZER_CONFIG, changed)
    return files


def values_of(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """Return the values of a JSON file; empty if it is not there."""
    values: dict[str, Any] = json.loads(files[name]) if name in files else {}
    return values


def set_values(files: Files, name: str, values: Mapping[str, Any]) -> None:
    """Replace the values of a JSON file, which keeps its bytes if it has these values already."""
    if name not in files or _canonical(values_of(files, name)) != _canonical(values):
        files[name] = json_text(values).encode(errors="backslashreplace")


def write_files(files: Mapping[str, bytes], folder: Path) -> None:
    """Write files, each in one step."""
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        save_bytes(content, folder / name)


def update_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file, unless it has these values already."""
    before = {path.name: path.read_bytes()} if path.is_file() else {}
    after = dict(before)
    set_values(after, path.name, values)
    if after != before:
        write_files(after, path.parent)


def _read(folder: Path, names: Iterable[str]) -> Files:
    paths = {name: find_companion(folder, name) for name in names}
    return {name: path.read_bytes() for name, path in paths.items() if path is not None}


def _named_templates(folder: Path) -> list[str]:
    return sorted(f"{TEMPLATES_FOLDER}/{path.name}" for path in (folder / TEMPLATES_FOLDER).glob("*.jinja"))


def _first(candidates: Iterable[Files]) -> Files:
    return next((files for files in candidates if files), {})


def _canonical(values: Mapping[str, Any]) -> str:
    """Return JSON text that is equal for equal values only; ``==`` takes 1, 1.0 and true for equal."""
    return json.dumps(values, sort_keys=True)
