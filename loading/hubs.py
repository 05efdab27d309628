"""Where a checkpoint's files lie: a folder, or a model of a hub, from the local cache before the network."""

from __future__ import annotations

from pathlib import Path

from checkpoints.shards import open_checkpoint
from errors import ConfigError, one_line

# What a checkpoint is loaded from: no code, no other formats of the same weights.
_FILES = ["*.json", "*.safetensors", "pytorch_model*.bin", "*.tiktoken", "*.jinja", "merges.txt"]
# Without a network the answer comes at once or never.
_TIMEOUT = 5.0


def find_folder(name_or_path: str, cache_dir: str | None = None, hub: str = "hf") -> Path:
    """The folder of a checkpoint, downloaded if it has to be.

    Raises:
        ConfigError: no such folder, and no model of that name in the cache or on the hub.
    """
    path = Path(name_or_path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(
                f"--model_name_or_path {name_or_path}: the folder has no config.json", "Give the folder of a checkpoint"
            )
        return path
    if path.exists() or name_or_path.count("/") != 1 or name_or_path.startswith((".", "/", "~")):
        raise ConfigError(f"--model_name_or_path {name_or_path}: there is no such folder", "Check the path")
    fetch = _from_modelscope if hub == "modelscope" else _from_huggingface
    return fetch(name_or_path, cache_dir)


def cached_folder(name: str, cache_dir: str | None = None) -> Path | None:
    """Where Hugging Face's library keeps a model that it fetched before; the network is not asked."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(name, "config.json", cache_dir=cache_dir)
    except HFValidationError:  # a name that no model can have
        return None
    return Path(config).parent if isinstance(config, str) else None


def _from_huggingface(name: str, cache_dir: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    cached = cached_folder(name, cache_dir)
    flaw = _incomplete(cached) if cached else "no such folder, not in the local cache"
    if cached and not flaw:
        return cached
    reason = "the hub cannot be reached"
    try:
        folder = Path(snapshot_download(name, cache_dir=cache_dir, allow_patterns=_FILES, etag_timeout=_TIMEOUT))
        if not _incomplete(folder):  # without a network it may be what was in the cache before
            return folder
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = _why(error)
    raise ConfigError(
        f"--model_name_or_path {name}: {flaw}, and {reason}",
        f"Check the name, or fetch it where there is a network: hf download {name}",
    )


def _incomplete(folder: Path) -> str:
    """What is missing in a folder of the cache; empty where nothing is."""
    try:
        open_checkpoint(folder)
    except ConfigError as error:
        return f"in the local cache it is incomplete ({str(error).partition('. ')[0]})"
    return ""


def _why(error: Exception) -> str:
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    if isinstance(error, HFValidationError):
        return "no model can have this name"
    if isinstance(error, GatedRepoError):
        return "the hub wants its terms to be accepted and a token (hf auth login)"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no model of this name, or shows it to its owner only"
    if isinstance(error, LocalEntryNotFoundError):
        return "the hub cannot be reached"
    return f"the hub did not give it ({one_line(error)})"


def _from_modelscope(name: str, cache_dir: str | None) -> Path:
    try:
        from modelscope import snapshot_download  # type: ignore[import-not-found]
    except ImportError as error:
        raise ConfigError("--model_hub modelscope: its library is not installed", "pip install modelscope") from error
    for local_files_only in (True, False):
        try:
            return Path(snapshot_download(name, cache_dir=cache_dir, local_files_only=local_files_only))
        except Exception as error:  # its errors have no common class, and differ between versions
            failure = error
    raise ConfigError(
        f"--model_name_or_path {name}: not in modelscope's local cache, and not fetched ({one_line(failure)})",
        f"Check the name, or fetch it where there is a network: modelscope download --model {name}",
    ) from failure
