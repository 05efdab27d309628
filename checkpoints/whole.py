"""Text models that are published within a larger one: Qwen3.5 and later, with a vision tower and layers that draft.

Such a folder has the config of the text model under ``text_config``, its tensors as ``model.language_model.*``, and
tensors of other parts (``model.visual.*``, ``mtp.*``). This toolkit reads the text model alone, by the names that it
has without the rest, and writes the rest as it is. Needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoints.files import load_json
from qwen_model.architectures import TEXT_TYPES

TEXT_CONFIG = "text_config"

_WITHIN_WHOLE, _ALONE = "model.language_model.", "model."
LONGER_NAMES = {rf"^{re.escape(_WITHIN_WHOLE)}": _ALONE}
"""A pattern of stored names, and what replaces it in those of the text model alone."""
_OTHER_PARTS = ("model.visual.", "mtp.")
_OF_BOTH = ("tie_word_embeddings", "quantization_config", "dtype", "torch_dtype")
"""Settings of the text model that the whole config may have instead."""

ADAPTER_PREFIX = "base_model.model."
"""Beginning of the names of an adapter's tensors; the name of the model's module follows."""
_MODULE_OPTIONS = (
    "target_modules", "exclude_modules", "modules_to_save", "trainable_token_indices", "rank_pattern", "alpha_pattern",
)  # fmt: skip


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


def with_text_config(config: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json with another config of the text model, each value where it was; any other config: ``text``.

    Args:
        text: the config of :func:`text_config` with values that were changed, added or removed.
    """
    if not is_whole(config):
        return dict(text)
    before, own = text_config(config), config[TEXT_CONFIG]
    changed = {key: value for key, value in text.items() if key not in before or before[key] != value}
    removed = before.keys() - text.keys()
    within = {key: value for key, value in own.items() if key not in removed}
    around = {key: value for key, value in config.items() if key not in removed or key not in _OF_BOTH}
    for key, value in changed.items():
        if key == "tie_word_embeddings" or key in own or key not in around:
            within[key] = value
        if key == "tie_word_embeddings" or (key in _OF_BOTH and key in around):
            around[key] = value
    dtype = text.get("dtype") or text.get("torch_dtype")
    declared: dict[str, Any] = {key: dtype for key in ("dtype", "torch_dtype") if key in around and dtype}
    return {**around, **declared, TEXT_CONFIG: within}


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


def adapter_text_name(stored: str) -> str:
    """Return the name that a stored tensor of an adapter has on the text model alone; see :func:`text_name`."""
    name = stored.removeprefix(ADAPTER_PREFIX)
    return ADAPTER_PREFIX + (text_name(name) or name) if name != stored else stored


def adapter_whole_name(name: str) -> str:
    """Return the name that a tensor of an adapter has on the whole model."""
    return ADAPTER_PREFIX + whole_name(name.removeprefix(ADAPTER_PREFIX))


def text_options(options: Mapping[str, Any], adapted: Sequence[str]) -> dict[str, Any]:
    """Return the options of an adapter on the whole model, for the text model alone.

    Args:
        adapted: the text model's modules that the adapter has matrices for: an expression may not match their names.
    """
    renamed = _with_modules(options, lambda module: re.sub(r"language_model(\.|\\\.)", "", module, count=1))
    if isinstance(renamed.get("target_modules"), str):
        renamed |= {"target_modules": list(adapted), "exclude_modules": None}
    return renamed


def whole_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of an adapter on the text model alone, for the whole model."""
    return _with_modules(
        options, lambda module: re.sub(r"\bmodel(\.|\\\.)", r"model\1language_model\1", module, count=1)
    )


def _with_modules(options: Mapping[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
    """Rename the modules in an adapter's options; an expression for all of them is left as it is."""
    renamed = dict(options)
    for option in _MODULE_OPTIONS:
        value = options.get(option)
        if isinstance(value, Mapping):
            renamed[option] = {rename(module): each for module, each in value.items()}
        elif value and not isinstance(value, str):
            renamed[option] = [rename(module) for module in value]
    return renamed
