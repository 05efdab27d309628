"""Loading a checkpoint: first everything but its weights, then the model in a given precision."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedModel
from transformers.activations import ACT2FN

from chat.chatml import END_OF_TEXT, IM_END
from chat.families import Family
from chat.stops import end_ids_of
from checkpoints.base_files import CONFIG, Files, read_base_files, set_values, values_of
from checkpoints.dequantized_reader import open_dequantized
from checkpoints.files import is_file
from checkpoints.input_folders import check_model_files
from checkpoints.model_config import DTYPE_NAMES, Quantization, find_quantization
from checkpoints.other_parts import OtherParts, open_other_parts
from checkpoints.rope import Yarn, find_yarn_fault, resolved, with_yarn
from checkpoints.shards import open_checkpoint
from checkpoints.source import TensorSource, is_finite
from checkpoints.whole import LONGER_NAMES, load_text_config
from errors import ConfigError, one_line
from loading.chat_family import chat_family
from loading.chat_template_file import FLAG, adapters_template, read_chat_template, replace_chat_template
from loading.hubs import find_folder
from loading.opening import library_errors
from loading.quantized import compute_in_float32, loading_arguments, patch_bitsandbytes_linear
from loading.tensor_check import check_tensors
from loading.tokenizer import load_tokenizer
from qwen_model.architectures import architecture_of
from qwen_model.lean_models import model_class_of
from qwen_model.register import register_qwen

logger = logging.getLogger(__name__)


@dataclass
class Checkpoint:
    """A checkpoint without its weights.

    Attributes:
        name: folder or model id, as given by the user.
        folder: folder of its files.
        dtype: precision of its weights, in which a run's results are saved.
        chat_format: Qwen v1's ``chatml`` or ``raw``; ``None`` if its files contain neither.
        quantization: how its weights are quantised; ``None`` if they are not.
        files: config, generation settings and tokenizer as they are in its folder.
        other_parts: what the folder has beside the text model, if that is a part of a larger one.
        yarn: how the rotary embeddings of ``config`` and ``files`` are scaled, beyond the folder's own config.
    """

    name: str
    folder: Path
    config: Any
    tokenizer: Any
    family: Family
    generation_config: GenerationConfig
    dtype: torch.dtype
    chat_format: str | None
    quantization: Quantization | None
    files: Files
    other_parts: OtherParts | None = None
    yarn: Yarn | None = None

    @property
    def model_type(self) -> str:
        return str(self.config.model_type)

    @property
    def end_ids(self) -> list[int]:
        """Ids that end an answer: those of the chat format, ``<|im_end|>``, and end-of-text at the end."""
        return end_ids_of(self.tokenizer, self.family.stops)


def load_checkpoint(
    name_or_path: str,
    cache_dir: str | None = None,
    hub: str = "hf",
    *,
    reads_weights: bool = True,
    yarn: Yarn | None = None,
    chat_template: str | None = None,
    adapters: Sequence[str] = (),
) -> Checkpoint:
    """Read a checkpoint without its weights, of which names, shapes and dtypes are checked.

    Args:
        name_or_path: a folder, or the model id on a hub.
        cache_dir: cache folder of the hub's library; ``None``: its default.
        hub: ``hf`` or ``modelscope``.
        reads_weights: else they may be missing, and the dtype is the config's.
        yarn: scales the rotary embeddings of its config.
        chat_template: file with a template that replaces the checkpoint's.
        adapters: folders of adapters; the template that they were trained with replaces the checkpoint's, too.

    Raises:
        ConfigError: no such checkpoint, an unsupported model_type, a tokenizer of another model, a chat template that
            cannot be used, or weights that are missing, truncated, or not those of the config.
    """
    register_qwen()
    folder = find_folder(name_or_path, cache_dir, hub)
    check_model_files(folder)
    yarn = None if yarn is None else resolved(yarn, load_text_config(folder))
    config = load_config(folder, yarn)
    try:
        source = open_dequantized(folder, torch.float16) if reads_weights else None
    except ConfigError as error:
        raise ConfigError(f"--model_name_or_path {error}") from error
    tokenizer = load_tokenizer(folder, f"--model_name_or_path {folder}: its tokenizer cannot be read")
    files = read_base_files(folder)
    place = _choose_template(str(config.model_type), tokenizer, files, chat_template, adapters)
    with library_errors(f"{folder}: its chat template", "Restore the official chat template", path=place or ""):
        family = chat_family(config.model_type, tokenizer, place)
    generation_config = load_generation_config(folder)
    _check_tokenizer(folder, config, tokenizer, generation_config)
    try:
        if source is not None:
            check_tensors(folder, source)
    except ConfigError as error:
        raise ConfigError(f"--model_name_or_path {error}") from error
    return Checkpoint(
        name=name_or_path,
        folder=folder,
        config=config,
        tokenizer=tokenizer,
        family=family,
        generation_config=generation_config,
        dtype=saved_dtype(source, config),
        chat_format=chat_format_of(config, generation_config),
        quantization=find_quantization(folder),
        files=_with_yarn(files, yarn),
        yarn=yarn,
        other_parts=open_other_parts(folder) if reads_weights else None,
    )


def _choose_template(
    model_type: str, tokenizer: Any, files: Files, chat_template: str | None, adapters: Sequence[str]
) -> str | None:
    """Give a tokenizer and a checkpoint's files the template of a file or an adapter; return its place if it has one.

    Raises:
        ConfigError: a file that cannot be used, or that a checkpoint with a fixed format cannot take.
    """
    if not architecture_of(model_type).brings_chat_template:
        if chat_template is not None:
            what = f"{FLAG} {chat_template}: Qwen v1 has one fixed chat format, which no template decides"
            raise ConfigError(what, "Leave it out, or convert the checkpoint with scripts.convert_layout first")
        return None
    if chat_template is not None:
        text, place = read_chat_template(chat_template), f"{FLAG} {chat_template}"
    elif (of_adapters := adapters_template(adapters, tokenizer.chat_template)) is not None:
        text, place = of_adapters, f"the adapter in {adapters[0]}"
    else:
        return None
    tokenizer.chat_template = text
    replace_chat_template(files, text)
    return place


def load_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    attn_implementation: str | None = None,
    quantize: Quantization | None = None,
    device_map: str | Mapping[str, Any] | None = None,
) -> Any:
    """Load the model in evaluation mode; on the CPU, or on the GPU if bitsandbytes quantises it there.

    Args:
        dtype: precision that it computes in, and that its weights have in memory. The unquantised weights of a
            quantised model (embedding, norms, head) keep their stored precision if that is narrower.
        quantize: quantise the model while loading it.
        device_map: where its parts go, as in ``from_pretrained``; ``None``: the CPU, or as said above.

    Raises:
        ConfigError: weights that are missing, damaged, not finite or of other shapes than in the config.
    """
    place = f"--model_name_or_path {checkpoint.folder}"
    arguments: dict[str, Any] = {"config": checkpoint.config}
    storage_dtype = dtype
    if checkpoint.quantization or quantize:
        storage_dtype = checkpoint.dtype if dtype == torch.float32 else dtype
        arguments = loading_arguments(checkpoint.folder, checkpoint.config, checkpoint.quantization, quantize, dtype)
    if is_bitsandbytes := "device_map" in arguments:
        _check_stored(checkpoint.folder)
    if device_map is not None:
        arguments["device_map"] = device_map
    if checkpoint.other_parts is not None:
        arguments["key_mapping"] = LONGER_NAMES
    try:
        with library_errors(place, "Copy the weights again from the original checkpoint"):
            model, loaded = model_class_of(checkpoint.model_type).from_pretrained(
                None if "state_dict" in arguments else str(checkpoint.folder),
                dtype=storage_dtype,
                attn_implementation=attn_implementation,
                output_loading_info=True,
                **arguments,
            )
    except ConfigError as error:
        cause = one_line(error.__cause__ or error)
        if attn_implementation is not None and attn_implementation.replace("_", "") in cause.lower().replace("_", ""):
            what = f"--attn_implementation {attn_implementation}: {cause.rstrip('.')}"
            raise ConfigError(what, "Install what it needs, or give sdpa") from error
        raise
    assert not loaded["missing_keys"], f"transformers left {sorted(loaded['missing_keys'])} at random values"
    _check_finite(model, checkpoint)
    if is_bitsandbytes:
        patch_bitsandbytes_linear(model, dtype)
    if storage_dtype != dtype:
        compute_in_float32(model)
    return model


def _check_stored(folder: Path) -> None:
    """Raise unless all stored values are finite: after bitsandbytes has rounded them, it is not visible any more."""
    reader = open_checkpoint(folder)
    for name in reader.names():
        if not all(map(is_finite, reader.blocks(name))):
            raise ConfigError(f"{folder}: {name} holds NaN or infinity", "Copy the weights again")


@torch.no_grad()
def _check_finite(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Raise unless all weights are finite: one NaN would make every loss NaN, without naming the weight."""
    for name, parameter in (*model.named_parameters(), *model.named_buffers()):
        if not is_finite(getattr(parameter, "ds_tensor", parameter)):  # ZeRO-3: this rank's shard
            reader = open_checkpoint(checkpoint.folder)
            file = reader.path_of(name) if name in reader else checkpoint.folder
            raise ConfigError(
                f"{file}: {name} holds NaN or infinity in {str(parameter.dtype).removeprefix('torch.')}",
                "Copy the file again from the original checkpoint"
                + (", or use --bf16 instead of --fp16" if parameter.dtype == torch.float16 else ""),
            )


def _with_yarn(files: Files, yarn: Yarn | None) -> Files:
    if yarn is not None:
        set_values(files, CONFIG, with_yarn(values_of(files, CONFIG), yarn))
    return files


def scaled_checkpoint(checkpoint: Checkpoint, yarn: Yarn | None) -> Checkpoint:
    """Return a checkpoint whose config has scaled rotary embeddings.

    Raises:
        ConfigError: they cannot be scaled.
    """
    return checkpoint if yarn is None else replace(checkpoint, config=load_config(checkpoint.folder, yarn), yarn=yarn)


def load_config(folder: Path, yarn: Yarn | None = None) -> Any:
    """Load config.json of a supported ``model_type`` with transformers; Qwen v1 must be registered.

    Of a model with other parts, it is the config of its text model.

    Raises:
        ConfigError: it is missing, or transformers cannot use it.
    """
    file = folder / "config.json"
    values = load_text_config(folder)
    architecture_of(values.get("model_type"), file)
    if yarn is not None and (fault := find_yarn_fault(values, yarn)):
        raise ConfigError(
            f"{file}: {yarn} cannot be applied: {fault}", "Use the config.json of the original checkpoint"
        )
    values = with_yarn(values, yarn)
    fix = "Copy it again from the original checkpoint, or install a transformers that supports the model"
    with library_errors(str(file), fix):
        config = CONFIG_MAPPING[values["model_type"]].from_dict(values, name_or_path=str(folder))
    activation = getattr(config, "hidden_act", None)
    if activation is not None and activation not in ACT2FN:
        raise ConfigError(f"{file}: hidden_act {activation!r} is unknown", "Qwen models have silu")
    return config


def load_generation_config(folder: Path) -> GenerationConfig:
    """Load generation_config.json; that of transformers' defaults if there is none."""
    file = folder / "generation_config.json"
    if not is_file(file):
        return GenerationConfig()
    with library_errors(str(file), "Copy it again from the original checkpoint"):
        return GenerationConfig.from_pretrained(str(folder))


def chat_format_of(config: Any, generation_config: GenerationConfig) -> str | None:
    """Return Qwen v1's ``chat_format``."""
    # Qwen v1 in Qwen2's layout keeps it in config.json: it is not a key of later families' generation configs.
    qwen_config = getattr(config, "qwen_config", None) or {}
    return getattr(generation_config, "chat_format", None) or qwen_config.get("chat_format")


def _check_tokenizer(folder: Path, config: Any, tokenizer: Any, generation_config: GenerationConfig) -> None:
    """Raise if the tokenizer does not fit: a rank file without its last lines loads, with wrong special ids."""
    ends = end_ids_of(tokenizer)
    if not ends:
        raise ConfigError(
            f"{folder}: the tokenizer has no {IM_END} or no {END_OF_TEXT}", "Use the checkpoint's own tokenizer"
        )
    if len(tokenizer) > config.vocab_size:
        raise ConfigError(
            f"{folder}: the tokenizer has {len(tokenizer)} ids, the model {config.vocab_size} rows",
            "Use the tokenizer that belongs to the model",
        )
    end, pad = ends[-1], generation_config.pad_token_id
    if config.model_type == "qwen" and pad is not None and pad != end and pad >= 256:
        raise ConfigError(
            f"{folder}: end-of-text is id {end} in qwen.tiktoken and {pad} in generation_config.json",
            "The rank file is incomplete or belongs to another model: copy it from the original checkpoint",
        )


def saved_dtype(source: TensorSource | None, config: Any) -> torch.dtype:
    """Return the dtype in the config, else that of the first stored matrix; float32 without a ``source``."""
    dtype = config.dtype or next((name for flag, name in DTYPE_NAMES.items() if getattr(config, flag, False)), None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."))
    if dtype is None:
        dtypes = (source.dtype(name) for name in source.names()) if source else iter(())
        dtype = next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)
    return dtype
