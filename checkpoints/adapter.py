"""Read a LoRA adapter's folder without peft: which base parameter each of its tensors changes, and how.

Names, ranks and scales follow peft's rules (`peft/tuners/lora/model.py`, `peft/utils/other.py`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints.adapter_config import load_adapter_config
from checkpoints.input_folders import check_files
from checkpoints.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from checkpoints.patterns import check_patterns, module_pattern
from checkpoints.shards import CheckpointReader, open_checkpoint
from checkpoints.source import is_finite
from checkpoints.whole import ADAPTER_PREFIX, text_name
from errors import ConfigError

# Name pattern of an adapter's tensor -> its role, and the parameter of the module that it changes. Files not written by
# save_pretrained also contain the adapter's name (".default").
_ROLES = tuple(
    (re.compile(rf"(?P<module>.+)\.{pattern}"), role, parameter)
    for pattern, role, parameter in (
        (r"lora_A(\.[^.]+)?\.weight", "lora_A", "weight"),
        (r"lora_B(\.[^.]+)?\.weight", "lora_B", "weight"),
        (r"lora_B(\.[^.]+)?\.bias", "lora_bias", "bias"),
        (r"lora_embedding_A(\.[^.]+)?", "embedding_A", "weight"),
        (r"lora_embedding_B(\.[^.]+)?", "embedding_B", "weight"),
        (r"lora_magnitude_vector(\.[^.]+)?(\.weight)?", "magnitude", "weight"),
        (r"token_adapter\.trainable_tokens_delta(\.[^.]+)?", "rows", "weight"),
        (r"modules_to_save\.[^.]+\.(?P<parameter>.+)", "replacement", None),
        (r"base_layer\.(?P<parameter>weight|bias)", "replacement", None),
        (r"(?P<parameter>[^.]+)", "replacement", None),
    )
)
_PARTNERS = {"lora_A": "lora_B", "lora_B": "lora_A", "embedding_A": "embedding_B", "embedding_B": "embedding_A"}


@dataclass
class Edit:
    """The change that an adapter makes to one parameter of the base.

    ``roles`` maps a role to the name of the adapter's tensor. In the order in which they are applied: ``replacement``
    replaces the parameter; ``lora_A`` and ``lora_B`` (for an embedding ``embedding_A`` and ``embedding_B``) add their
    product times ``scale``; ``magnitude`` (DoRA) sets the norms; ``lora_bias`` is added to a bias, times ``scale``;
    ``rows`` replaces the rows ``row_indices``.
    """

    roles: dict[str, str] = field(default_factory=dict)
    rank: int = 0
    scale: float = 1.0
    row_indices: tuple[int, ...] = ()


@dataclass(frozen=True)
class Adapter:
    """An adapter: its config, its tensors (on disk) and its edits by name of the base's parameter."""

    folder: Path
    config: dict[str, Any]
    tensors: CheckpointReader
    edits: dict[str, Edit]

    def read(self, edit: Edit, role: str) -> Tensor:
        """Return an edit's tensor in float32, maybe as a view of the file: do not change it in place."""
        return self.tensors.read(edit.roles[role]).to(torch.float32)


def read_adapter(folder: str | Path, flag: str = "--adapter") -> Adapter:
    """Read the folder of a LoRA adapter saved by peft or by the original Qwen script.

    Args:
        flag: the flag that named the folder, for messages.

    Raises:
        ConfigError: no adapter, a method other than LoRA, an option that cannot be merged, a duplicate tensor, one
            without its counterpart, or one that is not finite.
    """
    folder = Path(folder)
    config = load_adapter_config(folder, flag)
    check_files(folder)
    tensors = open_checkpoint(folder, ADAPTER_WEIGHTS)
    edits: dict[str, Edit] = {}
    parsed = {name: _parse_name(name, folder) for name in tensors.names()}
    # The options are those of the names in the file.
    stored = {name: _parse_name(tensors.stored_name(name), folder)[0] for name in parsed}
    check_patterns(config, set(stored.values()), str(folder / ADAPTER_CONFIG))
    for name, (_, role, parameter) in parsed.items():
        module = stored[name]
        edit = edits.setdefault(parameter, Edit())
        if role in edit.roles:
            what = f"{folder}: {name} and {edit.roles[role]} have the same role"
            raise ConfigError(what, "Keep one adapter per file")
        edit.roles[role] = name
        edit.rank, edit.scale = _rank_and_scale(module, config)
        if role == "rows":
            edit.row_indices = _row_indices(module, config, folder)
    if not edits:
        raise ConfigError(f"{folder} holds an adapter without tensors", "Save the adapter again")
    for parameter, edit in edits.items():
        _check_roles(parameter, edit, config, folder)
    for name in tensors.names():
        if not all(map(is_finite, tensors.blocks(name))):
            raise ConfigError(f"{folder}: {name} holds NaN or infinity", "The training diverged: train again")
    return Adapter(folder, config, tensors, edits)


def _parse_name(name: str, folder: Path) -> tuple[str, str, str]:
    """Name of an adapter's tensor -> (module, role, name of the base's parameter)."""
    for pattern, role, parameter in _ROLES:
        if name.startswith(ADAPTER_PREFIX) and text_name(name.removeprefix(ADAPTER_PREFIX)) is None:
            what = f"{folder}: {name} is not of the text model, which is all that this toolkit reads"
            raise ConfigError(what, "Use an adapter of the text model alone")
        if name.startswith(ADAPTER_PREFIX) and (match := pattern.fullmatch(name, len(ADAPTER_PREFIX))):
            return match["module"], role, f"{match['module']}.{parameter or match['parameter']}"
    raise ConfigError(f"{folder}: {name} is not the name of a LoRA tensor", f"Names must start with {ADAPTER_PREFIX}")


def _rank_and_scale(module: str, config: Mapping[str, Any]) -> tuple[int, float]:
    """Return a module's rank and scale, from the first pattern that matches the end of the module's name, if any."""

    def by_pattern(option: str, default: int) -> Any:
        patterns = config.get(option) or {}
        key = next((key for key in patterns if re.match(module_pattern(key), module)), module)
        return patterns.get(key, default)

    rank = by_pattern("rank_pattern", config.get("r", 8))
    alpha = by_pattern("alpha_pattern", config.get("lora_alpha", 8))
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _row_indices(module: str, config: Mapping[str, Any], folder: Path) -> tuple[int, ...]:
    """Return the token ids of an adapter's rows for a module, in the order of the rows."""
    indices = config.get("trainable_token_indices")
    if isinstance(indices, dict):
        indices = next((ids for name, ids in indices.items() if module.endswith(name)), None)
    if not indices:
        what = (
            f"{folder}: trainable_token_indices of adapter_config.json lacks {module}, but the file contains its rows"
        )
        raise ConfigError(what, "Use the adapter_config.json that the tensors were saved with")
    return tuple(indices)


def _check_roles(parameter: str, edit: Edit, config: Mapping[str, Any], folder: Path) -> None:
    """Check that every A has its B, DoRA has its magnitude, and each parameter is trained in one way."""
    low_rank = [role for role in edit.roles if role in _PARTNERS]
    for role in low_rank:
        if _PARTNERS[role] not in edit.roles:
            what = f"{folder}: {edit.roles[role]} is saved without its {_PARTNERS[role].removeprefix('embedding_')}"
            raise ConfigError(what, "The file is incomplete: save the adapter again")
    if len(low_rank) > 2 or (low_rank and "rows" in edit.roles):
        raise ConfigError(f"{folder}: {parameter} is trained in two ways ({', '.join(edit.roles)})", "Keep one of them")
    if ("magnitude" in edit.roles) != bool(low_rank and config.get("use_dora")):
        what = f"{folder}: use_dora is {bool(config.get('use_dora'))} but {parameter} has {', '.join(edit.roles)}"
        raise ConfigError(what, "Use the adapter_config.json that the tensors were saved with")
