"""Finding a checkpoint: a folder, or a model of a hub, from the local cache if possible and else from the network."""

from __future__ import annotations

import os
from pathlib import Path

from checkpoints.files import is_file
from checkpoints.folder_kind import fix_for_no_model
from checkpoints.input_folders import check_name
from checkpoints.shards import open_checkpoint
from console import pip_command
from errors import ConfigError, one_line
from loading.config_files import find_cached_folder, find_in_modelscope_cache

# The files that a checkpoint is loaded from: no code, no other formats of the weights.
_FILES = ["*.json", "*.safetensors", "pytorch_model*.bin", "*.tiktoken", "*.jinja", "merges.txt"]
_TIMEOUT = 5.0  # seconds; without a network an answer comes at once or never


def find_folder(name_or_path: str, cache_dir: str | None = None, hub: str = "hf") -> Path:
    """Return the folder of a checkpoint; download the checkpoint if necessary.

    Raises:
        ConfigError: no such folder, and no model of that name in the cache or on the hub.
    """
    check_name(name_or_path, "--model_name_or_path")
    path = Path(name_or_path)
    if os.path.isdir(path):
        if not is_file(path / "config.json"):
            what = f"--model_name_or_path {name_or_path}: the folder has no config.json"
            raise ConfigError(what, fix_for_no_model(path, "Give the folder of a checkpoint"))
        return path
    if os.path.lexists(path) or name_or_path.count("/") != 1 or name_or_path.startswith((".", "/", "~")):
        raise ConfigError(f"--model_name_or_path {name_or_path}: there is no such folder", "Check the path")
    fetch = _fetch_from_modelscope if hub == "modelscope" else _fetch_from_huggingface
    return fetch(name_or_path, cache_dir)


def _fetch_from_huggingface(name: str, cache_dir: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    cached = find_cached_folder(name, cache_dir)
    cache_fault = _incompleteness(cached) if cached else "no such folder, not in the local cache"
    if cached and not cache_fault:
        return cached
    hub_fault = "the hub cannot be reached"
    try:
        folder = Path(snapshot_download(name, cache_dir=cache_dir, allow_patterns=_FILES, etag_timeout=_TIMEOUT))
        if not _incompleteness(folder):  # without a network, the library returns the incomplete folder of the cache
            return folder
    except (OSError, ValueError, HfHubHTTPError) as error:
        hub_fault = _describe(error)
    raise ConfigError(
        f"--model_name_or_path {name}: {cache_fault}, and {hub_fault}",
        f"Check the name, or download it on a machine with network access: hf download {name}",
    )


def _incompleteness(folder: Path) -> str:
    """Describe what is missing in a folder of the cache; empty if it is complete."""
    try:
        open_checkpoint(folder)
    except ConfigError as error:
        return f"incomplete in the local cache ({str(error).partition('. ')[0]})"
    return ""


def _describe(error: Exception) -> str:
    """Describe an error of Hugging Face's library."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    if isinstance(error, HFValidationError):
        return "this is not a valid model name"
    if isinstance(error, GatedRepoError):
        return "the hub requires accepting its terms and a token (hf auth login)"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no model of this name, or it is private"
    if isinstance(error, LocalEntryNotFoundError):
        return "the hub cannot be reached"
    return f"the download failed ({one_line(error)})"


def _fetch_from_modelscope(name: str, cache_dir: str | None) -> Path:
    cached = find_in_modelscope_cache(name, cache_dir)
    if cached and not _incompleteness(cached):
        return cached
    try:
        from modelscope import snapshot_download  # type: ignore[import-not-found]
    except ImportError as error:
        raise ConfigError("--model_hub modelscope: its library is not installed", pip_command("modelscope")) from error
    try:
        return Path(snapshot_download(name, cache_dir=cache_dir))
    except Exception as error:  # its errors have no common class and differ between versions
        fault = f"not in modelscope's local cache, and the download failed ({one_line(error)})"
        raise ConfigError(
            f"--model_name_or_path {name}: {fault}",
            f"Check the name, or download it on a machine with network access: modelscope download --model {name}",
        ) from error
