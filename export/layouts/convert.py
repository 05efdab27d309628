"""Whole folders in another layout: checkpoints and adapters, with what lies beside their weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from chat.stops import end_ids_of, stopping_generation_config
from checkpoints.adapter import read_adapter
from checkpoints.dequantized_reader import open_dequantized
from checkpoints.files import load_json, save_json
from checkpoints.folders import check_space, staged_folder
from checkpoints.model_config import with_dtype
from checkpoints.shards import fingerprint, open_checkpoint
from checkpoints.source import InDtype, TensorSource
from checkpoints.writing import save_source
from errors import ConfigError
from export.chat import write_chat_template, write_generation_config
from export.folder import TOKENIZER_FILES, convert_tokenizer, copy_first, copy_tokenizer
from export.layouts.adapter_config import save_relaid_adapter
from export.layouts.config import KEPT, find_quantization_config
from export.layouts.qwen2_names import Layout, layout_of_names
from export.merging import relaid
from export.model_card import copy_licenses
from export.progress import progress_bar
from export.standalone import write_code
from qwen_model.register import register_qwen

LAYOUTS = ("qwen", "qwen2")


@dataclass(frozen=True)
class Conversion:
    """What is asked for.

    Attributes:
        source, output: the folder to read, and the one to write.
        layout: ``None`` for the one that the source has not.
        base: of an adapter: the base that it names from now on; ``None`` for the one it names.
        dtype: of a checkpoint, torch's name: its floats, dequantised if need be; ``None`` for what is stored.
        dynamic_ntk: of a checkpoint: see :func:`export.layouts.config.config_to_qwen2`.
        max_shard_size: of a checkpoint's weight files, in bytes.
    """

    source: Path
    output: Path
    layout: Layout | None
    base: str | None
    dtype: str | None
    dynamic_ntk: bool
    max_shard_size: int


def _other_layout(found: str, given: Conversion) -> Layout:
    """The layout to write: the one asked for, or the one that the input has not."""
    target: Layout = given.layout or ("qwen2" if found == "qwen" else "qwen")
    if target == found:
        raise ConfigError(f"--layout {target}: {given.source} has this layout already", "Give the other one")
    return target


def convert_adapter(given: Conversion) -> str:
    """Write an adapter and give the line that says what was done.

    Raises:
        ConfigError: an adapter that cannot be read, or that the layout has no place for.
    """
    adapter = read_adapter(given.source)
    found = layout_of_names(adapter.edits)
    if found is None:
        raise ConfigError(f"{given.source}: the adapter has the same names in every layout", "Use it as it is")
    target = _other_layout(found, given)
    with staged_folder(given.output, "OUT") as folder:
        save_relaid_adapter(adapter, target, folder, given.base)
        _convert_companions(given, folder, target)
        _save_adapter_generation_config(given, folder, target)
    return f"an adapter of {len(adapter.edits)} parameters, {found} -> {target}"


def convert_checkpoint(given: Conversion) -> str:
    """Write a checkpoint and give the line that says what was done.

    Raises:
        ConfigError: a checkpoint that cannot be read, or that the layout has no place for.
    """
    config = load_json(given.source / "config.json")
    if (model_type := config.get("model_type")) not in LAYOUTS:
        what = f"{given.source / 'config.json'}: model_type {model_type!r} has no other layout"
        raise ConfigError(what, "Only qwen and qwen2 have")
    target = _other_layout(str(model_type), given)
    source, changed = relaid(_open_source(given, config), config, target, given.dynamic_ntk)
    if given.dtype:
        changed = with_dtype(changed, given.dtype)
    with staged_folder(given.output, "OUT") as folder:
        check_space(source.total_nbytes(), given.output, "OUT")
        with progress_bar(source, "converting") as bar:
            files = save_source(source, folder, given.max_shard_size, bar.update)
        _keep_origin(given, config, changed)
        save_json(changed, folder / "config.json")
        _convert_companions(given, folder, target)
        _save_generation_config(given, config, folder)
        if target == "qwen":
            write_code(folder)
    return f"{len(source.names())} tensors in {len(files)} file(s), {model_type} -> {target}"


def _open_source(given: Conversion, config: dict[str, Any]) -> TensorSource:
    """The tensors of the input, dequantised if ``--dtype`` says so; ``config`` then says how they are quantised."""
    if given.dtype:
        config.pop("quantization_config", None)
        dtype = getattr(torch, given.dtype)
        return InDtype(open_dequantized(given.source, dtype), dtype)
    if quantization_config := find_quantization_config(given.source, config):
        config["quantization_config"] = quantization_config
    return open_checkpoint(given.source)


def _keep_origin(given: Conversion, config: dict[str, Any], changed: dict[str, Any]) -> None:
    """Say in the new config which weights these are, and what its layout has no other place for."""
    if given.dtype is None:  # values that were rounded are others
        changed["converted_from"] = {"layout": config["model_type"], "fingerprint": fingerprint(given.source)}
    file = given.source / "generation_config.json"
    if KEPT in changed and file.is_file() and "chat_format" in (settings := load_json(file)):
        changed[KEPT]["chat_format"] = settings["chat_format"]


def _convert_companions(given: Conversion, folder: Path, layout: Layout) -> None:
    """The tokenizer in the new layout, if there is one; licences as they are."""
    copy_tokenizer([given.source], folder)
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        convert_tokenizer(folder, layout)
    copy_licenses(given.source, folder)


def _save_generation_config(given: Conversion, config: dict[str, Any], folder: Path) -> None:
    """Settings that end an answer, and for Qwen v1 whether the model knows ChatML."""
    file = folder / "generation_config.json"
    copy_first(file.name, [given.source], folder)
    write_generation_config(folder)
    write_chat_template(folder)
    chat_format = (config.get(KEPT) or {}).get("chat_format")
    if chat_format and file.is_file():
        save_json(load_json(file) | {"chat_format": chat_format}, file)


def _save_adapter_generation_config(given: Conversion, folder: Path, layout: Layout) -> None:
    """The generation settings that were saved beside the adapter and its tokenizer, with the keys of the new layout."""
    file = given.source / "generation_config.json"
    if file.is_file() and (folder / "tokenizer_config.json").is_file():
        register_qwen()
        end_ids = end_ids_of(AutoTokenizer.from_pretrained(str(folder)))
        save_json(stopping_generation_config(load_json(file), end_ids, layout), folder / file.name)
