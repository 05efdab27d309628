"""Options of a LoRA adapter, ``adapter_config.json``: the same rules wherever an adapter is opened; needs no torch.

peft takes any key of the file as an argument of its config, and imports modules that some of them name. Here a key is
known, or without effect, or refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints.files import is_file, load_json
from checkpoints.folder_kind import no_adapter
from checkpoints.input_folders import check_name
from checkpoints.json_rules import shown
from checkpoints.json_schemas import ADAPTER_ROWS
from checkpoints.names import ADAPTER_CONFIG
from errors import ConfigError

# Options without effect on the saved tensors and what they do: of an initialisation, of training, or of other methods
# that another option would have to select. The last rows are written by other toolkits.
_WITHOUT_EFFECT = frozenset({
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config",
    "lorap_emb_lr", "lorap_lr_ratio", "loraplus_lr_ratio", "loraplus_lr_embedding", "lora_dtype", "swift_type",
    "model_key_mapping", "unsloth_version", "unsloth_fixed",
})  # fmt: skip
# Initialisations that leave the base unchanged. The others (pissa, olora, corda, loftq, lora_ga) move a part of it into
# the adapter, which then fits only the changed base.
_PLAIN_INITS = frozenset({"true", "false", "none", "gaussian", "eva", "orthogonal", "mica"})
# What peft writes although nothing uses it: a module that is imported only with `megatron_config`, and the class of the
# base, which only its AutoPeftModel imports.
_UNUSED_MEGATRON = "megatron.core"
_UNUSED_LIBRARIES = ("transformers", "transformers_modules", "qwen_model")


def load_adapter_config(folder: Path, flag: str) -> dict[str, Any]:
    """Read and check the options of an adapter; only those that have an effect are returned.

    Args:
        flag: the flag that named the folder, for messages.

    Raises:
        ConfigError: no adapter, a method other than LoRA, a wrong value, an option that names code, or one that is set
            and not understood.
    """
    check_name(folder, flag)
    path = folder / ADAPTER_CONFIG
    if not is_file(path):
        raise no_adapter(folder, flag)
    config = load_json(path)
    if config.get("peft_type") != "LORA":
        what = f"{path}: peft_type {config.get('peft_type')} cannot be merged, asked or trained further"
        raise ConfigError(what, "Only LORA adapters can")
    init = str(config.get("init_lora_weights", True)).lower()
    if init not in _PLAIN_INITS:
        raise ConfigError(
            f"{path}: init_lora_weights {init} trains on a changed copy of the base, which is not available",
            "Convert the adapter with peft's save_pretrained(path_initial_model_for_weight_conversion=...) first",
        )
    for option, value in config.items():
        if option not in ADAPTER_ROWS:
            _check_other_option(option, value, path)
    return {option: value for option, value in config.items() if option in ADAPTER_ROWS}


def _check_other_option(option: str, value: Any, path: Path) -> None:
    if _is_unset(value) or option in _WITHOUT_EFFECT:
        return
    if option == "megatron_core" and value == _UNUSED_MEGATRON:
        return
    if option == "auto_mapping" and _names_known_library(value):
        return
    if option in ("megatron_core", "megatron_config", "auto_mapping"):
        what = f"{path}: the option {option} ({shown(value)}) names code, which is never run"
        raise ConfigError(what, f"Set {option} to null if you trust the adapter's tensors")
    what = f"{path}: the option {option} ({shown(value)}) is not supported"
    raise ConfigError(what, "Merge it with the program that saved it, or set it to null if it has no effect")


def _is_unset(value: Any) -> bool:
    """Return whether a value switches nothing on: null, false, zero, empty, or an object of such values."""
    return not value or (isinstance(value, Mapping) and all(map(_is_unset, value.values())))


def _names_known_library(value: Any) -> bool:
    library = value.get("parent_library") if isinstance(value, Mapping) else None
    return library is None or (isinstance(library, str) and library.partition(".")[0] in _UNUSED_LIBRARIES)
