"""Convert whole folders, checkpoints or adapters, to another layout, with the files beside their weights."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from chat.stops import end_ids_of, stopping_generation_config
from checkpoints.adapter import Adapter, read_adapter
from checkpoints.base_files import read_tokenizer, update_json, write_files
from checkpoints.companions import TOKENIZER_FILES, copy_companion, find_companion
from checkpoints.dequantized_reader import open_dequantized
from checkpoints.files import load_json, load_json_or_empty, save_json
from checkpoints.folders import check_space, staged_folder
from checkpoints.input_folders import check_model_files
from checkpoints.model_config import with_dtype
from checkpoints.names import RUN_SUMMARY
from checkpoints.shards import fingerprint, open_checkpoint
from checkpoints.source import InDtype, TensorSource
from checkpoints.whole import adapter_text_name, load_text_config
from checkpoints.writing import save_source
from errors import ConfigError
from export.chat import write_chat_template, write_generation_config
from export.companion_files import convert_tokenizer
from export.inputs import find_base
from export.layouts.adapter_config import save_converted_adapter
from export.layouts.config import QWEN_CONFIG, find_quantization_config
from export.layouts.convert import convert_model
from export.layouts.qwen2_names import LAYOUTS, Layout, layout_of_names
from export.model_card import copy_licenses
from export.progress import progress_bar
from export.standalone import write_code
from loading.tensor_check import check_tensors
from loading.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

_ONLY_THESE = "Only qwen and qwen2 can be converted"


@dataclass(frozen=True)
class Conversion:
    """Options of a conversion.

    Attributes:
        source, output: folder to read and folder to write.
        layout: layout to write; ``None`` for the one that the source does not have.
        base: adapters only: base to name in the new adapter_config.json; ``None`` keeps the name.
        dtype: checkpoints only: torch's name of the dtype to dequantise and convert to; ``None`` keeps what is stored.
        dynamic_ntk: checkpoints only: see :func:`export.layouts.config.config_to_qwen2`.
        max_shard_size: checkpoints only: maximum size of a weight file in bytes.
    """

    source: Path
    output: Path
    layout: Layout | None
    base: str | None
    dtype: str | None
    dynamic_ntk: bool
    max_shard_size: int


def convert_adapter(options: Conversion) -> str:
    """Convert an adapter's folder; return a one-line summary.

    Raises:
        ConfigError: an adapter that cannot be read, or that the layout cannot express.
    """
    adapter = read_adapter(options.source)
    layout = layout_of_names(adapter.edits)
    if layout is None:
        raise ConfigError(f"{options.source}: the adapter has the same names in every layout", "Use it as it is")
    if layout == "qwen2":
        _check_family(adapter)
    target = _target_layout(layout, options)
    with staged_folder(options.output, "OUT") as folder:
        save_converted_adapter(adapter, target, folder, options.base)
        _convert_tokenizer_and_licenses(options, folder, target)
        _save_adapter_generation_config(options, folder, target)
    return f"an adapter of {len(adapter.edits)} parameters, {layout} -> {target}"


def _check_family(adapter: Adapter) -> None:
    """Raise ``ConfigError`` for an adapter of a later family, which may have the same names as one of Qwen2."""
    stored = map(adapter.tensors.stored_name, adapter.tensors.names())
    if longer := next((name for name in stored if adapter_text_name(name) != name), None):
        what = f"{adapter.folder}: {longer} is of the text model of a larger one, which has no other layout"
        raise ConfigError(what, _ONLY_THESE)
    if (model_type := _base_type(adapter)) is None:
        logger.warning(
            "%s: its base is not on this machine. It is taken for an adapter of Qwen2; those of Qwen3 can have the "
            "same names",
            adapter.folder,
        )
    elif model_type not in LAYOUTS:
        what = f"{adapter.folder} is an adapter of a model of model_type {model_type!r}, which has no other layout"
        raise ConfigError(what, _ONLY_THESE)


def _base_type(adapter: Adapter) -> str | None:
    """Return the ``model_type`` of the model that was adapted: as recorded, or as its config.json has it, if any."""
    if recorded := load_json_or_empty(adapter.folder / RUN_SUMMARY).get("model_type"):
        return str(recorded)
    try:
        return str(load_text_config(find_base(None, adapter.folder, adapter.config)).get("model_type"))
    except ConfigError:
        return None


def convert_checkpoint(options: Conversion) -> str:
    """Convert a checkpoint's folder; return a one-line summary.

    Raises:
        ConfigError: a checkpoint that cannot be read, or that the layout cannot express.
    """
    check_model_files(options.source)
    config = load_json(options.source / "config.json")
    if (model_type := config.get("model_type")) not in LAYOUTS:
        what = f"{options.source / 'config.json'}: model_type {model_type!r} has no other layout"
        raise ConfigError(what, _ONLY_THESE)
    target = _target_layout(model_type, options)
    source, new_config = convert_model(_open_source(options, config), config, target, options.dynamic_ntk)
    check_tensors(options.source, open_dequantized(options.source, torch.float16))
    if options.dtype:
        new_config = with_dtype(new_config, options.dtype)
    with staged_folder(options.output, "OUT") as folder:
        check_space(source.total_nbytes(), options.output, "OUT")
        with progress_bar(source, "converting") as bar:
            files = save_source(source, folder, options.max_shard_size, bar.update)
        _record_origin(options, config, new_config)
        save_json(new_config, folder / "config.json")
        _convert_tokenizer_and_licenses(options, folder, target)
        _save_generation_config(options, config, folder)
        if target == "qwen":
            write_code(folder)
    return f"{len(source.names())} tensors in {len(files)} file(s), {model_type} -> {target}"


def _target_layout(layout: Layout, options: Conversion) -> Layout:
    """Return the layout to write; raise ConfigError if the source, of ``layout``, has it already."""
    target: Layout = options.layout or ("qwen2" if layout == "qwen" else "qwen")
    if target == layout:
        raise ConfigError(f"--layout {target}: {options.source} has this layout already", "Give the other one")
    return target


def _open_source(options: Conversion, config: dict[str, Any]) -> TensorSource:
    """Open the input's tensors, dequantised with ``--dtype``; update ``quantization_config`` in ``config`` to match."""
    if options.dtype:
        config.pop("quantization_config", None)
        dtype = getattr(torch, options.dtype)
        return InDtype(open_dequantized(options.source, dtype), dtype)
    if quantization_config := find_quantization_config(options.source, config):
        config["quantization_config"] = quantization_config
    return open_checkpoint(options.source)


def _record_origin(options: Conversion, config: dict[str, Any], new_config: dict[str, Any]) -> None:
    """Record in the new config the source's fingerprint, and a chat format that its layout cannot express."""
    if options.dtype is None:  # rounded values are no longer those of the source
        new_config["converted_from"] = {"layout": config["model_type"], "fingerprint": fingerprint(options.source)}
    file = find_companion(options.source, "generation_config.json")
    if QWEN_CONFIG in new_config and file and "chat_format" in (settings := load_json(file)):
        new_config[QWEN_CONFIG]["chat_format"] = settings["chat_format"]


def _convert_tokenizer_and_licenses(options: Conversion, folder: Path, layout: Layout) -> None:
    write_files(read_tokenizer([options.source]), folder)
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        convert_tokenizer(folder, layout)
    copy_licenses(options.source, folder)


def _save_generation_config(options: Conversion, config: dict[str, Any], folder: Path) -> None:
    """Write the settings that end an answer, and for Qwen v1 the chat format (base or ChatML)."""
    file = folder / "generation_config.json"
    copy_companion(file.name, [options.source], folder)
    write_generation_config(folder)
    write_chat_template(folder)
    chat_format = (config.get(QWEN_CONFIG) or {}).get("chat_format")
    if chat_format and file.is_file():
        update_json(file, load_json(file) | {"chat_format": chat_format})


def _save_adapter_generation_config(options: Conversion, folder: Path, layout: Layout) -> None:
    """Write the generation settings saved with the adapter and its tokenizer, with the keys of the new layout."""
    file = find_companion(options.source, "generation_config.json")
    if file and (folder / "tokenizer_config.json").is_file():
        end_ids = end_ids_of(load_tokenizer(folder, f"{options.source}: its tokenizer"))
        save_json(stopping_generation_config(load_json(file), end_ids, layout), folder / file.name)
