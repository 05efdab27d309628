"""Facts about a checkpoint that need neither torch nor the network: folder, config, names of tensors."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints.files import is_file, load_json_or_empty, open_regular
from checkpoints.whole import has_other_parts, text_config, text_name

# Kinds of scaled rotary embeddings whose `factor` multiplies the trained length; for others, the config's
# max_position_embeddings is the extended length.
_EXTENDING_ROPES = ("linear", "dynamic", "yarn")


def find_cached_folder(hub_id: str, cache_dir: str | None = None) -> Path | None:
    """Return the folder of a model in the local cache of Hugging Face, else of ModelScope; ``None`` if in neither."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(hub_id, "config.json", cache_dir=cache_dir)
    except (HFValidationError, OSError, ValueError):  # not a valid model id, or too long for a file's name
        return None
    return Path(config).parent if isinstance(config, str) else find_in_modelscope_cache(hub_id, cache_dir)


def find_in_modelscope_cache(hub_id: str, cache_dir: str | None = None) -> Path | None:
    """Return the folder of a model that modelscope has downloaded, as its version 1.40 or an earlier one does."""
    cache = Path(cache_dir or os.environ.get("MODELSCOPE_CACHE") or Path.home() / ".cache" / "modelscope")
    owner, _, name = hub_id.partition("/")
    older = Path(owner, name.replace(".", "___"))
    snapshots = cache / "models" / f"{owner}--{name}" / "snapshots"
    folders = [snapshots / "master", *sorted(snapshots.glob("*"))]
    folders += [cache / "models" / older, cache / "hub" / "models" / older, cache / "hub" / older, cache / older]
    return next((folder for folder in folders if is_file(folder / "config.json")), None)


def find_local_folder(name_or_path: str, cache_dir: str | None = None, hub: str = "hf") -> Path:
    """Return the folder of a checkpoint as far as it is known without the network, else ``name_or_path`` itself."""
    path = Path(name_or_path)
    if os.path.lexists(path) or name_or_path.count("/") != 1:
        return path
    find = find_in_modelscope_cache if hub == "modelscope" else find_cached_folder
    return find(name_or_path, cache_dir) or path


def load_model_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json`` of the text model; empty if it cannot be read, which loading the checkpoint reports."""
    return text_config(load_json_or_empty(folder / "config.json"))


def max_positions(config: Mapping[str, Any]) -> int | None:
    """Return the longest sequence that a model supports; not Qwen v1's ``seq_length``, which dynamic NTK extends.

    Scaled rotary embeddings extend it: YaRN, for one, to ``factor`` times the length that the model was trained with.
    """
    stated = next(
        (size for name in ("max_position_embeddings", "n_positions") if _is_size(size := config.get(name))), None
    )
    rope = config.get("rope_scaling") or config.get("rope_parameters")
    if stated is None or not isinstance(rope, dict) or rope.get("rope_type", rope.get("type")) not in _EXTENDING_ROPES:
        return stated
    trained, factor = rope.get("original_max_position_embeddings") or stated, rope.get("factor") or 1
    return max(stated, int(trained * factor)) if _is_size(trained) and isinstance(factor, (int, float)) else stated


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def module_names(folder: Path) -> list[str]:
    """Return the modules with a weight, from a checkpoint's index or headers; empty if neither can be read."""
    names: set[str] = set()
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        weight_map = load_json_or_empty(folder / index).get("weight_map")
        names |= weight_map.keys() if isinstance(weight_map, dict) else set()
    for file in () if names else sorted(folder.glob("*.safetensors")):
        names |= _safetensors_header(file).keys()
    if has_other_parts(load_json_or_empty(folder / "config.json")):
        names = {name for stored in names if (name := text_name(stored)) is not None}
    modules = (name.rpartition(".") for name in names)
    return sorted(module for module, _, part in modules if part in ("weight", "qweight"))


def _safetensors_header(file: Path) -> dict[str, Any]:
    """Read the header of a safetensors file: eight bytes of length, then JSON. ``safe_open`` would import numpy."""
    try:
        with open_regular(file) as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            header = json.loads(stream.read(min(length, 100_000_000)))
    except (OSError, ValueError, RecursionError):
        return {}  # loading the weights reports it
    return header if isinstance(header, dict) else {}
