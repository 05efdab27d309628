"""Facts about a checkpoint that need neither torch nor the network: folder, config, names of tensors."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from checkpoints.files import load_json_or_empty


def find_cached_folder(hub_id: str, cache_dir: str | None = None) -> Path | None:
    """Return the folder of a model in Hugging Face's local cache; ``None`` if it is not there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(hub_id, "config.json", cache_dir=cache_dir)
    except HFValidationError:  # not a valid hub id
        return None
    return Path(config).parent if isinstance(config, str) else None


def find_local_folder(name_or_path: str, cache_dir: str | None = None, hub: str = "hf") -> Path:
    """Return the folder of a checkpoint as far as it is known without the network, else ``name_or_path`` itself."""
    path = Path(name_or_path)
    if hub != "hf" or path.exists() or name_or_path.count("/") != 1:
        return path
    return find_cached_folder(name_or_path, cache_dir) or path


def load_model_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json``; empty if it cannot be read, which loading the checkpoint reports."""
    return load_json_or_empty(folder / "config.json")


def max_positions(config: dict[str, Any]) -> int | None:
    """Return the longest sequence that a model supports; not Qwen v1's ``seq_length``, which dynamic NTK extends."""
    for name in ("max_position_embeddings", "n_positions"):
        if isinstance(config.get(name), int) and config[name] > 0:
            return int(config[name])
    return None


def module_names(folder: Path) -> list[str]:
    """Return the modules with a weight, from a checkpoint's index or headers; empty if neither can be read."""
    names: set[str] = set()
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        weight_map = load_json_or_empty(folder / index).get("weight_map")
        names |= weight_map.keys() if isinstance(weight_map, dict) else set()
    for file in () if names else sorted(folder.glob("*.safetensors")):
        names |= _safetensors_header(file).keys()
    modules = (name.rpartition(".") for name in names)
    return sorted(module for module, _, part in modules if part in ("weight", "qweight"))


def _safetensors_header(file: Path) -> dict[str, Any]:
    """Read the header of a safetensors file: eight bytes of length, then JSON. ``safe_open`` would import numpy."""
    try:
        with file.open("rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            header = json.loads(stream.read(min(length, 100_000_000)))
    except (OSError, ValueError):
        return {}  # loading the weights reports it
    return header if isinstance(header, dict) else {}
