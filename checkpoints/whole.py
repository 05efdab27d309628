"""Text models that are published within a larger one: Qwen3.5 and later, with a vision tower and layers that draft.

Such a folder has the config of the text model under ``text_config``, its tensors as ``model.language_model.*``, and
tensors of other parts (``model.visual.*``, ``mtp.*``). This toolkit reads the text model alone, by the names that it
has without the rest, and writes the rest as it is. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints.files import load_json
from qwen_model.architectures import TEXT_TYPES

TEXT_CONFIG = "text_config"

_WITHIN_WHOLE, _ALONE = "model.language_model.", "model."
_OTHER_PARTS = ("model.visual.", "mtp.")
_OF_BOTH = ("tie_word_embeddings", "quantization_config", "dtype", "torch_dtype")
"""Settings of the text model that the whole config may have instead."""


def is_whole(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json is that of a larger model with a text model in it."""
    return config.get("model_type") in TEXT_TYPES and isinstance(config.get(TEXT_CONFIG), Mapping)


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of the text model, with what the whole config decides; any other config as it is."""
    if not is_whole(config):
        return dict(config)
    own = {"model_type": TEXT_TYPES[config["model_type"]], **config[TEXT_CONFIG]}
    shared = {key: config[key] for key in _OF_BOTH if config.get(key) is not None}
    # The head is tied in the whole model, the other settings are the text model's if it has them.
    tied = {key: value for key, value in shared.items() if key == "tie_word_embeddings"}
    declared = own.get("dtype") or own.get("torch_dtype")
    missing = {key: value for key, value in shared.items() if not (declared and key.endswith("dtype"))}
    return missing | own | tied


def load_text_config(folder: Path) -> dict[str, Any]:
    """Read config.json of a folder; of a larger model, the config of the text model.

    Raises:
        ConfigError: see :func:`checkpoints.files.load_json`.
    """
    return text_config(load_json(folder / "config.json"))


def has_other_parts(config: Mapping[str, Any]) -> bool:
    """Return whether the folder of a config.json may have tensors of other parts, or the text model's longer names."""
    return is_whole(config) or config.get("model_type") in TEXT_TYPES.values()


def text_name(stored: str) -> str | None:
    """Return the name that a stored tensor has in the text model alone; ``None`` for one of another part."""
    if stored.startswith(_WITHIN_WHOLE):
        return _ALONE + stored.removeprefix(_WITHIN_WHOLE)
    return None if stored.startswith(_OTHER_PARTS) else stored


def whole_name(name: str) -> str:
    """Return the name that a tensor of the text model has in the whole one."""
    return _WITHIN_WHOLE + name.removeprefix(_ALONE) if name.startswith(_ALONE) else name
