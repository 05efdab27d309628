"""adapter_config.json for an adapter under other names, and the folder that peft opens."""

from __future__ import annotations

import math
import shutil
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints.adapter import Adapter
from checkpoints.files import save_json
from checkpoints.names import ADAPTER_CONFIG, ADAPTER_SAFETENSORS, BASE_QUANTIZATION, RUN_RECORDS
from checkpoints.writing import save_tensors
from export.layouts.adapter import Lora, convert_adapter_tensors
from export.layouts.qwen2_names import Layout, convert_suffix

# Files beside an adapter that are true of it in any layout.
_COPIED = (*RUN_RECORDS, BASE_QUANTIZATION, "README.md", "LICENSE")


def save_converted_adapter(adapter: Adapter, layout: Layout, folder: Path, base: str | None = None) -> None:
    """Write an adapter for the same base in another layout, with the records of its run.

    Args:
        base: what the adapter is to name as its base; by default what it names now.

    Raises:
        ConfigError: see :func:`export.layouts.adapter.convert_adapter_tensors`.
    """
    converted = convert_adapter_tensors(adapter, layout)
    save_tensors(converted.tensors, folder / ADAPTER_SAFETENSORS)
    config = build_adapter_config(adapter.config, converted.loras, layout)
    if base is not None:
        config["base_model_name_or_path"] = base
    save_json(config, folder / ADAPTER_CONFIG)
    for name in _COPIED:
        if (adapter.folder / name).is_file():
            shutil.copyfile(adapter.folder / name, folder / name)


def build_adapter_config(config: Mapping[str, Any], loras: Mapping[str, Lora], layout: Layout) -> dict[str, Any]:
    """An adapter's config in another layout.

    Args:
        config: the adapter's adapter_config.json.
        loras: of the modules under their new names.
    """
    changed = dict(config) | _ranks_and_alphas(config, loras) | {"auto_mapping": None}
    targets = config.get("target_modules")
    if isinstance(targets, str) or config.get("exclude_modules") or not targets:
        # What an expression means is what it has met.
        changed |= {"target_modules": sorted(loras), "exclude_modules": None}
    else:
        changed["target_modules"] = _renamed(targets, layout)
    if modules := config.get("modules_to_save"):
        changed["modules_to_save"] = _renamed(modules, layout)
    if isinstance(rows := config.get("trainable_token_indices"), dict):
        changed["trainable_token_indices"] = {
            name: ids for module, ids in rows.items() for name in _renamed([module], layout)
        }
    if pattern := config.get("layers_pattern"):
        names = {"h": "layers"} if layout == "qwen2" else {"layers": "h"}
        several = [pattern] if isinstance(pattern, str) else pattern
        changed["layers_pattern"] = [names.get(name, name) for name in several]
    return changed


def _renamed(modules: list[str], layout: Layout) -> list[str]:
    """Endings of names in another layout, each once; one that no module of a Qwen has stays."""
    return list(dict.fromkeys(name for module in modules for name in convert_suffix(layout, module) or (module,)))


def _ranks_and_alphas(config: Mapping[str, Any], loras: Mapping[str, Lora]) -> dict[str, Any]:
    """Rank and alpha of most modules, and patterns that say those of the others."""
    use_rslora = bool(config.get("use_rslora"))
    values = {module: (lora.rank, _alpha(lora, use_rslora)) for module, lora in loras.items()}
    if not values:
        return {}
    (rank, alpha), _ = Counter(values.values()).most_common(1)[0]
    by_ending: dict[str, set[tuple[int, float]]] = defaultdict(set)
    for module, value in values.items():
        by_ending[module.rpartition(".")[2]].add(value)
    ranks, alphas = {}, {}
    for module, (of_module, alpha_of_module) in values.items():
        ending = module.rpartition(".")[2]
        key = ending if len(by_ending[ending]) == 1 else module
        if of_module != rank:
            ranks[key] = of_module
        if alpha_of_module != alpha:
            alphas[key] = alpha_of_module
    return {"r": rank, "lora_alpha": alpha, "rank_pattern": ranks, "alpha_pattern": alphas}


def _alpha(lora: Lora, use_rslora: bool) -> float:
    """What peft divides by the rank, or by its root, to get the factor; a whole number where that is exact."""
    divisor = math.sqrt(lora.rank) if use_rslora else lora.rank
    alpha = lora.scale * divisor
    return round(alpha) if round(alpha) / divisor == lora.scale else alpha
