"""The inputs of a merge: adapters with their weights, and the base checkpoint."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoints.adapter import read_adapter
from checkpoints.dequantized_reader import open_dequantized
from checkpoints.files import is_file, load_json
from checkpoints.fold import WeightedAdapter
from checkpoints.folder_kind import fix_for_no_model
from checkpoints.input_folders import check_model_files
from checkpoints.model_config import Quantization, declared_dtype, find_quantization
from checkpoints.other_parts import OtherParts, open_other_parts
from checkpoints.rope import Yarn, find_yarn_fault, with_yarn
from checkpoints.source import TensorSource
from checkpoints.training_samples import TrainingSamples
from checkpoints.whole import text_config
from errors import ConfigError
from loading.config_files import find_cached_folder
from loading.tensor_check import check_tensors

MAX_WEIGHT = 10**6
"""Of an adapter's change. Squares of the changes must be numbers in float32, for the merge to be measured."""


@dataclass(frozen=True)
class Base:
    """An opened checkpoint folder.

    Attributes:
        config: contents of config.json; of a larger model, those of its text model.
        file_config: contents of config.json.
        source: the tensors under their plain names; quantised ones are dequantised when read.
        other_parts: what the folder has beside the text model.
        quantization: how the stored weights are quantised, if they are.
    """

    folder: Path
    config: dict[str, Any]
    file_config: dict[str, Any]
    source: TensorSource
    other_parts: OtherParts | None
    quantization: Quantization | None

    @property
    def model_type(self) -> str:
        return str(self.config["model_type"])


def load_adapters(values: Sequence[str]) -> list[WeightedAdapter]:
    """Read the adapters that ``--adapter`` names as ``DIR`` or ``DIR=WEIGHT``.

    An existing folder whose name contains ``=`` is taken literally, with weight 1.

    Raises:
        ConfigError: a weight that is no number or beyond ``MAX_WEIGHT``, a folder given twice or without a readable
            adapter.
    """
    adapters = []
    for value in values:
        folder, _, weight = (value, "", "1") if os.path.isdir(value) else value.rpartition("=")
        if not folder:
            folder, weight = weight, "1"
        try:
            factor = float(weight)
        except ValueError:
            factor = math.nan
        if not abs(factor) <= MAX_WEIGHT:  # true for NaN
            fix = f"Write a number of at most {MAX_WEIGHT:,}, like --adapter output/a=0.7"
            raise ConfigError(f"--adapter {value}: {weight!r} is not a weight", fix)
        adapters.append(WeightedAdapter(read_adapter(folder), factor))
        TrainingSamples.read(adapters[-1].adapter.folder)  # a checkpoint's are in the run's folder: refused here too
    folders = [each.adapter.folder.resolve() for each in adapters]
    if duplicate := next((folder for folder in folders if folders.count(folder) > 1), None):
        raise ConfigError(f"--adapter {duplicate} is given twice", "Give it once, with the sum of its weights")
    return adapters


def find_base(base: Path | None, adapter: Path, adapter_config: dict[str, Any]) -> Path:
    """Return the base's folder: ``--base``, else the one that the adapter names.

    A named folder is looked up relative to the working directory, the adapter's folder and its parent; a model id in
    the local cache.

    Raises:
        ConfigError: no such folder.
    """
    if base is not None:
        if not is_file(base / "config.json"):
            fix = fix_for_no_model(base, "Give the folder of the model that was tuned")
            raise ConfigError(f"--base {base} has no config.json", fix)
        return base
    name = adapter_config.get("base_model_name_or_path")
    if name:
        for folder in (Path(name), adapter / name, adapter.resolve().parent / name):
            if is_file(folder / "config.json"):
                return folder
        if name.count("/") == 1 and (cached := find_cached_folder(name)):
            return cached
    what = f"the adapter {adapter} names the base {name!r}, which is not a model folder on this machine"
    raise ConfigError(what, "Give the base's folder with --base DIR")


def open_base(folder: Path, yarn: Yarn | None = None) -> Base:
    """Open a checkpoint to merge into; of its weights only the headers are read.

    Args:
        yarn: scales the rotary embeddings of its config, as in the training of the adapters.

    Raises:
        ConfigError: weights that are missing, damaged, quantised in a way that cannot be read, or not those of the
            config.
    """
    check_model_files(folder)
    file_config = load_json(folder / "config.json")
    if yarn is not None and (fault := find_yarn_fault(file_config, yarn)):
        what = f"{folder / 'config.json'}: {fault}, and the adapter was trained with {yarn}"
        raise ConfigError(what, "Give the base of its training with --base")
    file_config = with_yarn(file_config, yarn)
    config = text_config(file_config)
    if not isinstance(config.get("model_type"), str):
        what = f"{folder / 'config.json'} has no model_type"
        raise ConfigError(what, "Copy it again from the original checkpoint")
    # Without a declared dtype: float16, as the scales of GPTQ and AWQ.
    dequantized_dtype = getattr(torch, declared_dtype(config) or "float16")
    source = open_dequantized(folder, dequantized_dtype)
    check_tensors(folder, source)
    return Base(folder, config, file_config, source, open_other_parts(folder), find_quantization(folder))
