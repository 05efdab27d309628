"""The base that adapters are merged into: what it is stored as, and whether it is the one they were trained on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoints.adapter import Adapter
from checkpoints.dequantized_reader import open_dequantized
from checkpoints.files import load_json
from checkpoints.model_config import (
    DTYPE_NAMES,
    Quantization,
    declared_dtype,
    find_quantization,
    load_base_quantization,
)
from checkpoints.shards import fingerprint
from checkpoints.source import TensorSource
from errors import ConfigError, numbered

logger = logging.getLogger(__name__)

RUN_SUMMARY = "run_summary.json"


@dataclass(frozen=True)
class Base:
    """A checkpoint folder, opened.

    Attributes:
        config: its config.json.
        source: its tensors under their plain names, dequantised where it is quantised.
        quantization: how it is quantised, if it is.
    """

    folder: Path
    config: dict[str, Any]
    source: TensorSource
    quantization: Quantization | None

    @property
    def model_type(self) -> str:
        """The family, as the config says it."""
        return str(self.config["model_type"])


def open_base(folder: Path) -> Base:
    """Open a checkpoint to merge into; of its weights only the headers are read.

    Raises:
        ConfigError: weights that are missing, damaged, or quantised in a way that cannot be read.
    """
    config = load_json(folder / "config.json")
    if not isinstance(config.get("model_type"), str):
        what = f"{folder / 'config.json'} does not say its model_type"
        raise ConfigError(what, "Copy it again from the original checkpoint")
    stored = _dtype(declared_dtype(config) or "float16")  # as the scales of GPTQ and AWQ are
    return Base(folder, config, open_dequantized(folder, stored), find_quantization(folder))


def choose_dtype(flag: str, config: dict[str, Any]) -> torch.dtype | None:
    """What floats are written in; ``None`` leaves every tensor its own dtype.

    A base that declares fp32 but is stored in 16 bits is loaded, tuned and hence merged in fp32: rounding would take
    away from what was trained.
    """
    if flag != "auto":
        return _dtype(DTYPE_NAMES[flag])
    return torch.float32 if declared_dtype(config) == "float32" else None


def _dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def check_trained_on(base: Base, adapters: Sequence[Adapter], base_is_given: bool, any_base: bool) -> None:
    """Compare a base with the records that finetune.py leaves beside adapters, where there are some.

    Args:
        base_is_given: the user named the base; otherwise it is the one that the first adapter names.
        any_base: the user knows better: say what differs and go on.

    Raises:
        ConfigError: the base is not the one that an adapter was trained on, or the adapters come from several.
    """
    faults = _differences_between(adapters, base_is_given)
    known = _fingerprints(base) if any(_recorded(adapter) for adapter in adapters) else set()
    for adapter in adapters:
        if _recorded(adapter) in (None, *known):
            continue
        if base_is_given and base.quantization is None and _learnt_on_stored_quantized(adapter):
            logger.info(
                "%s was trained beside quantised weights: its changes are added to the unquantised ones of %s instead",
                adapter.folder,
                base.folder,
            )
            continue
        faults.append(
            f"--adapter {adapter.folder} was trained on other weights than those of {base.folder}: their fingerprint "
            f"is not the one in its {RUN_SUMMARY}"
        )
    if faults and not any_base:
        fix = (
            "Give the right base with --base; if its values are the right ones in other files, or you want this merge "
            "all the same, add --any_base"
        )
        raise ConfigError(faults[0] if len(faults) == 1 else numbered("the adapters do not fit", faults), fix)
    for fault in faults:
        logger.warning("%s. The merged model may not answer like the one that was trained", fault)


def _differences_between(adapters: Sequence[Adapter], base_is_given: bool) -> list[str]:
    first = adapters[0]
    faults = []
    for other in adapters[1:]:
        prints = _recorded(first), _recorded(other)
        names = [str(each.config.get("base_model_name_or_path")) for each in (first, other)]
        # Names say little once the user has said where the base lies: it may have moved in between.
        differ = prints[0] != prints[1] if None not in prints else names[0] != names[1] and not base_is_given
        if differ:
            places = f"{first.folder} ({names[0]}) and {other.folder} ({names[1]})"
            faults.append(f"--adapter: {places} were trained on different bases")
    return faults


def _summary(adapter: Adapter) -> dict[str, Any]:
    file = adapter.folder / RUN_SUMMARY
    return load_json(file) if file.is_file() else {}


def _recorded(adapter: Adapter) -> str | None:
    found = _summary(adapter).get("base_fingerprint")
    return found if isinstance(found, str) else None


def _fingerprints(base: Base) -> set[str]:
    """Those of the base, and of the checkpoint whose values it holds under other names."""
    origin = base.config.get("converted_from")
    named = {str(origin.get("fingerprint"))} if isinstance(origin, dict) else set()
    return {fingerprint(base.folder), *named}


def _learnt_on_stored_quantized(adapter: Adapter) -> bool:
    """Whether the base's files were quantised already, and not only its weights in memory."""
    stored = _summary(adapter).get("base_is_quantized")
    if stored is not None:
        return bool(stored)
    quantization = load_base_quantization(adapter.folder)
    return quantization is not None and quantization.is_packed
