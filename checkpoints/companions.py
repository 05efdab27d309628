"""Files beside the weights of a checkpoint or adapter: tokenizer, settings, licences, records; needs no torch.

They are read and copied from the folder itself. A link in a folder of another person may lead to any file of this
machine, so links are followed only within the folder and to the files of a hub's cache.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from checkpoints.names import ADAPTER_CONFIG, BASE_QUANTIZATION, BASE_ROPE, RUN_RECORDS
from errors import ConfigError

TOKENIZER_FILES = (
    "tokenizer_config.json", "qwen.tiktoken", "qwen_extra.tiktoken", "tokenizer.json", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
"""Settings for images and videos, of models that take them."""
_VOCABULARIES = ("qwen.tiktoken", "tokenizer.json", "vocab.json")
LICENSES = re.compile(r"(LICEN[SC]E|NOTICE)\b", re.IGNORECASE)
"""Beginning of the names of licence files."""

_NAMES = {
    "config.json", "generation_config.json", "README.md", ADAPTER_CONFIG, BASE_QUANTIZATION, BASE_ROPE,
    *TOKENIZER_FILES, *PROCESSOR_FILES, *RUN_RECORDS,
}  # fmt: skip


def is_companion(name: str) -> bool:
    """Return whether files of this name are read or copied as companions."""
    return name in _NAMES or LICENSES.match(name) is not None


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder has a vocabulary; without one transformers makes an empty tokenizer with other ids."""
    return any((folder / name).is_file() for name in _VOCABULARIES)


def find_companion(folder: Path, name: str) -> Path | None:
    """Return the file ``name`` of a folder; ``None`` if it has none.

    Raises:
        ConfigError: a link that leads out of the folder.
    """
    path = folder / name
    if not path.is_file():
        return None
    check_inside(path, folder)
    return path


def check_inside(path: Path, folder: Path) -> None:
    """Raise ``ConfigError`` if a file of a folder is a link that leads out of it, except to a file of a hub's cache."""
    root, real = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    # Hugging Face's cache has models--ORG--NAME/snapshots/REVISION/config.json -> models--ORG--NAME/blobs/CHECKSUM.
    # Earlier versions of huggingface_hub also linked to blobs from the folder of --local-dir.
    is_blob = real.parent.name == "blobs" and real.parents[1].name.startswith("models--")
    if root not in real.parents and not is_blob:
        raise ConfigError(f"{path} leads out of its folder, to {real}", "Put a copy of the file in its place")


def find_licenses(folder: Path) -> list[str]:
    """Return the names of a folder's licence files.

    Raises:
        ConfigError: see :func:`find_companion`.
    """
    return sorted(name for name in os.listdir(folder) if LICENSES.match(name) and find_companion(folder, name))


def copy_companion(name: str, sources: Iterable[Path], folder: Path) -> None:
    """Copy file ``name`` from the first of ``sources`` that has it, if any.

    Raises:
        ConfigError: see :func:`find_companion`.
    """
    for source in sources:
        if (path := find_companion(source, name)) is not None:
            shutil.copyfile(path, folder / name)
            return
