"""Folders given in place of others: an adapter as a model, or a model as an adapter."""

from __future__ import annotations

import os
from pathlib import Path

from checkpoints.files import load_json_or_empty
from checkpoints.names import ADAPTER_CONFIG
from errors import ConfigError


def fix_for_no_model(folder: Path, otherwise: str) -> str:
    """Say how the adapter in a folder is used that was given as a model; ``otherwise`` if it holds no adapter."""
    if not os.path.isfile(folder / ADAPTER_CONFIG):
        return otherwise
    base = load_json_or_empty(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    return (
        f"It holds an adapter: give its base ({base or 'which it does not name'}) instead, and the adapter with "
        "--adapter (scripts.ask, merge_lora.py) or --lora_weight_path (finetune.py)"
    )


def no_adapter(folder: Path, flag: str) -> ConfigError:
    """Build the error for a folder without ``adapter_config.json`` that ``flag`` named."""
    kind = ": it is the folder of a model" if os.path.isfile(folder / "config.json") else ""
    return ConfigError(f"{flag} {folder} holds no {ADAPTER_CONFIG}{kind}", "Give the folder of a saved adapter")
