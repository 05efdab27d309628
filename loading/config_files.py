"""What can be known of a checkpoint without reading a weight, and without torch: its config and its tensors' names."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from checkpoints.files import load_json_or_empty


def find_local_folder(name_or_path: str, cache_dir: str | None = None, hub: str = "hf") -> Path:
    """The folder itself, or where a hub id lies in Hugging Face's cache; without a look at the network."""
    path = Path(name_or_path)
    if hub != "hf" or path.exists() or name_or_path.count("/") != 1:
        return path
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name_or_path, "config.json", cache_dir=cache_dir)
    except HFValidationError:
        return path
    return Path(cached).parent if isinstance(cached, str) else path


def load_model_config(folder: Path) -> dict[str, Any]:
    """``config.json``; empty where it cannot be read: whoever loads the checkpoint says why."""
    return load_json_or_empty(folder / "config.json")


def most_positions(config: dict[str, Any]) -> int | None:
    """The longest text a model can take. Qwen v1's ``seq_length`` is none: dynamic NTK goes beyond it."""
    for name in ("max_position_embeddings", "n_positions"):
        if isinstance(config.get(name), int) and config[name] > 0:
            return int(config[name])
    return None


def module_names(folder: Path) -> list[str]:
    """Modules with a weight, from the index or the headers of a checkpoint folder; empty where neither is there."""
    names: set[str] = set()
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        weight_map = load_json_or_empty(folder / index).get("weight_map")
        names |= weight_map.keys() if isinstance(weight_map, dict) else set()
    for file in () if names else sorted(folder.glob("*.safetensors")):
        names |= _header(file).keys()
    modules = (name.rpartition(".") for name in names)
    return sorted(module for module, _, part in modules if part in ("weight", "qweight"))


def _header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file: eight bytes of length, then JSON."""
    try:
        with file.open("rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            header = json.loads(stream.read(min(length, 100_000_000)))
    except (OSError, ValueError):
        return {}  # whoever loads the weights says why
    return header if isinstance(header, dict) else {}
