"""Write an adapter's folder in another layout: its adapter_config.json, tensors, and the records of its run."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints.adapter import Adapter
from checkpoints.companions import copy_companion
from checkpoints.files import save_json
from checkpoints.names import ADAPTER_CONFIG, ADAPTER_SAFETENSORS, BASE_QUANTIZATION, BASE_ROPE, RUN_RECORDS
from checkpoints.writing import save_tensors
from export.layouts.adapter import LoraScale, convert_adapter_tensors
from export.layouts.qwen2_names import Layout, convert_suffix

# Files beside an adapter that hold for any layout.
_COPIED = (*RUN_RECORDS, BASE_QUANTIZATION, BASE_ROPE, "README.md", "LICENSE")


def save_converted_adapter(adapter: Adapter, layout: Layout, folder: Path, base: str | None = None) -> None:
    """Write the adapter in ``layout`` as a folder that peft opens, with the records of its run.

    Args:
        base: the new ``base_model_name_or_path``; by default the adapter's.

    Raises:
        ConfigError: see :func:`export.layouts.adapter.convert_adapter_tensors`.
    """
    converted = convert_adapter_tensors(adapter, layout)
    save_tensors(converted.tensors, folder / ADAPTER_SAFETENSORS)
    config = convert_adapter_config(adapter.config, converted.loras, layout)
    if base is not None:
        config["base_model_name_or_path"] = base
    save_json(config, folder / ADAPTER_CONFIG)
    for name in _COPIED:
        copy_companion(name, [adapter.folder], folder)


def convert_adapter_config(config: Mapping[str, Any], loras: Mapping[str, LoraScale], layout: Layout) -> dict[str, Any]:
    """Return an adapter_config.json for ``layout``.

    Args:
        config: the adapter's config in the other layout.
        loras: rank and scale by the modules' new names.
    """
    changed = dict(config) | _ranks_and_alphas(config, loras) | {"auto_mapping": None}
    targets = config.get("target_modules")
    if isinstance(targets, str) or config.get("exclude_modules") or not targets:
        # A regular expression or an exclusion cannot be translated: list the modules that it matched.
        changed |= {"target_modules": sorted(loras), "exclude_modules": None}
    else:
        changed["target_modules"] = _rename_modules(targets, layout)
    if modules := config.get("modules_to_save"):
        changed["modules_to_save"] = _rename_modules(modules, layout)
    if isinstance(rows := config.get("trainable_token_indices"), dict):
        changed["trainable_token_indices"] = {
            name: ids for module, ids in rows.items() for name in _rename_modules([module], layout)
        }
    if pattern := config.get("layers_pattern"):
        names = {"h": "layers"} if layout == "qwen2" else {"layers": "h"}
        patterns = [pattern] if isinstance(pattern, str) else pattern
        changed["layers_pattern"] = [names.get(name, name) for name in patterns]
    return changed


def _rename_modules(modules: list[str], layout: Layout) -> list[str]:
    """Convert suffixes of module names without duplicates; a suffix that matches no module of Qwen is kept."""
    return list(dict.fromkeys(name for module in modules for name in convert_suffix(layout, module) or (module,)))


def _ranks_and_alphas(config: Mapping[str, Any], loras: Mapping[str, LoraScale]) -> dict[str, Any]:
    """Return ``r`` and ``lora_alpha`` of most modules, and the patterns for the others."""
    use_rslora = bool(config.get("use_rslora"))
    values = {module: (lora.rank, _alpha(lora, use_rslora)) for module, lora in loras.items()}
    if not values:
        return {}
    (rank, alpha), _ = Counter(values.values()).most_common(1)[0]
    by_suffix: dict[str, set[tuple[int, float]]] = defaultdict(set)
    for module, value in values.items():
        by_suffix[module.rpartition(".")[2]].add(value)
    rank_pattern, alpha_pattern = {}, {}
    for module, (module_rank, module_alpha) in values.items():
        suffix = module.rpartition(".")[2]
        key = suffix if len(by_suffix[suffix]) == 1 else module
        if module_rank != rank:
            rank_pattern[key] = module_rank
        if module_alpha != alpha:
            alpha_pattern[key] = module_alpha
    return {"r": rank, "lora_alpha": alpha, "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}


def _alpha(lora: LoraScale, use_rslora: bool) -> float:
    """Return peft's alpha, which it divides by the rank (rsLoRA: its root); an integer if that is exact."""
    divisor = math.sqrt(lora.rank) if use_rslora else lora.rank
    alpha = lora.scale * divisor
    return round(alpha) if round(alpha) / divisor == lora.scale else alpha
