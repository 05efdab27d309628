"""Tokenizer and model of a checkpoint, in the precision that a mode of training wants."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel

from chat.chatml import END_OF_TEXT, IM_END
from chat.families import Family
from chat.stops import end_ids_of
from checkpoints.model_config import Quantization, find_quantization
from checkpoints.shards import CheckpointReader, open_checkpoint
from checkpoints.source import is_finite
from errors import ConfigError, one_line
from loading.chat_family import chat_family
from loading.hubs import find_folder
from loading.quantized import compute_in_float32, loading_arguments, patch_bitsandbytes_linear
from qwen_model.architectures import architecture_of
from qwen_model.lean_models import model_class_of
from qwen_model.register import register_qwen

logger = logging.getLogger(__name__)


@dataclass
class Checkpoint:
    """What is known of a checkpoint before its weights are read.

    Attributes:
        name: as the user gave it, a folder or a hub id.
        folder: where its files lie.
        dtype: precision of its weights, in which a run's results are saved.
        chat_format: ``chatml`` or ``raw``, as Qwen v1's files say; ``None`` where they do not.
        quantization: how its weights are quantised; ``None`` where they are not.
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

    @property
    def model_type(self) -> str:
        return str(self.config.model_type)

    @property
    def end_ids(self) -> list[int]:
        """Ids that end an answer: ``<|im_end|>`` and end-of-text."""
        return end_ids_of(self.tokenizer)


def load_checkpoint(name_or_path: str, cache_dir: str | None = None, hub: str = "hf") -> Checkpoint:
    """Read everything of a checkpoint but its weights, of which only the headers are looked at.

    Args:
        name_or_path: a folder, or an id of a model on the hub.
        cache_dir: where the hub's library keeps models; by default its own place.
        hub: ``hf`` or ``modelscope``.

    Raises:
        ConfigError: no such checkpoint, an unknown model_type, a tokenizer that does not belong to the model, or
            weights that are missing or cut off.
    """
    register_qwen()
    folder = find_folder(name_or_path, cache_dir, hub)
    config = _load_config(folder)
    try:
        reader = open_checkpoint(folder)
    except ConfigError as error:
        raise ConfigError(f"--model_name_or_path: {error}") from error
    quantization = _find_quantization(folder, reader)
    tokenizer = _load_tokenizer(folder)
    family = chat_family(config.model_type, tokenizer)
    generation_config = _load_generation_config(folder)
    _check_tokenizer(folder, config, tokenizer, generation_config)
    return Checkpoint(
        name=name_or_path,
        folder=folder,
        config=config,
        tokenizer=tokenizer,
        family=family,
        generation_config=generation_config,
        dtype=_saved_dtype(reader, config),
        chat_format=_chat_format(config, generation_config),
        quantization=quantization,
    )


def load_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    attn_implementation: str | None = None,
    quantize: Quantization | None = None,
) -> Any:
    """The model of a checkpoint, in evaluation mode; on the CPU, or on the GPU that bitsandbytes quantises it on.

    Args:
        dtype: what it computes in. An unquantised model is held in it, too. Of a quantised one the rest (embedding,
            norms, head) is never held wider than it is stored.
        quantize: quantise a model that is not quantised while it is loaded.

    Raises:
        ConfigError: weights that are missing, broken, incomplete, not finite or of another shape than the config says.
    """
    where = f"--model_name_or_path {checkpoint.folder}"
    arguments, storage_dtype = {"config": checkpoint.config}, dtype
    if checkpoint.quantization or quantize:
        storage_dtype = checkpoint.dtype if dtype == torch.float32 else dtype
        arguments = loading_arguments(checkpoint.folder, checkpoint.config, checkpoint.quantization, quantize, dtype)
    try:
        loaded: Any = model_class_of(checkpoint.model_type).from_pretrained(
            None if "state_dict" in arguments else str(checkpoint.folder),
            dtype=storage_dtype,
            attn_implementation=attn_implementation,
            output_loading_info=True,
            **arguments,
        )
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    except (OSError, ImportError, RuntimeError, ValueError, SafetensorError) as error:
        if attn_implementation is not None and attn_implementation in str(error):
            raise ConfigError(f"--attn_implementation {attn_implementation}: {one_line(error)}") from error
        raise ConfigError(
            f"{where}: {one_line(error)}", "Copy the weights again from the original checkpoint"
        ) from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        # transformers fills them with random numbers.
        raise ConfigError(
            f"{where}: {len(missing)} tensors of the model are not among its weights, the first is {missing[0]}",
            "Copy config.json and all weight files again from the original checkpoint",
        )
    _check_finite(model, checkpoint)
    if "device_map" in arguments:
        patch_bitsandbytes_linear(model, dtype)
    if storage_dtype != dtype:
        compute_in_float32(model)
    return model


@torch.no_grad()
def _check_finite(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """A NaN in one weight makes every loss NaN, hours later and without a name."""
    for name, parameter in (*model.named_parameters(), *model.named_buffers()):
        if not is_finite(getattr(parameter, "ds_tensor", parameter)):  # ZeRO-3: this process's share
            files = open_checkpoint(checkpoint.folder).files
            file = next((file for file in files if name in CheckpointReader([file])), checkpoint.folder)
            raise ConfigError(
                f"{file}: {name} holds NaN or infinity in {str(parameter.dtype).removeprefix('torch.')}",
                "Copy the file again from the original checkpoint"
                + (", or use --bf16 instead of --fp16" if parameter.dtype == torch.float16 else ""),
            )


def _load_config(folder: Path) -> Any:
    file = folder / "config.json"
    try:
        model_type = json.loads(file.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ConfigError(
            f"{file}: not a JSON object ({error})", "Copy it again from the original checkpoint"
        ) from error
    architecture_of(model_type, file)
    return AutoConfig.from_pretrained(str(folder))


def _find_quantization(folder: Path, reader: CheckpointReader) -> Quantization | None:
    """What the configs say, which must be what the weights are."""
    quantization = find_quantization(folder)
    packed = next((name for name in reader.names() if name.endswith(".qweight")), None)
    copy_again = "Copy config.json and all weight files again from the original checkpoint"
    if quantization is not None and quantization.is_packed and packed is None:
        raise ConfigError(f"{folder}: its config says {quantization}, and none of its weights are", copy_again)
    if packed is not None and (quantization is None or not quantization.is_packed):
        raise ConfigError(f"{folder}: {packed} is quantised, and no config says how", copy_again)
    return quantization


def _load_generation_config(folder: Path) -> GenerationConfig:
    file = folder / "generation_config.json"
    if not file.exists():
        return GenerationConfig()
    try:
        return GenerationConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{file}: {one_line(error)}", "Copy it again from the original checkpoint") from error


def _load_tokenizer(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(str(folder))
    except ConfigError:
        raise
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"--model_name_or_path {folder}: its tokenizer cannot be read ({one_line(error)})",
            "Copy the tokenizer's files from the original checkpoint into the folder",
        ) from error


def _chat_format(config: Any, generation_config: GenerationConfig) -> str | None:
    # Qwen v1 in Qwen2's layout keeps it in config.json: later families' generation settings know no such key.
    kept = getattr(config, "qwen_config", None) or {}
    return getattr(generation_config, "chat_format", None) or kept.get("chat_format")


def _check_tokenizer(folder: Path, config: Any, tokenizer: Any, generation_config: GenerationConfig) -> None:
    """A rank file that lost lines still loads, with every special token at a wrong id."""
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
            "The rank file has lost lines or belongs to another model: copy it from the original checkpoint",
        )


def _saved_dtype(reader: CheckpointReader, config: Any) -> torch.dtype:
    """What the config says; where it says nothing, what the first matrix is stored in."""
    flagged = [dtype for name, dtype in _DTYPE_FLAGS.items() if getattr(config, name, False)]
    dtype = config.dtype or next(iter(flagged), None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."))
    if dtype is None:
        dtype = next(
            (dtype for name in reader.names() if (dtype := reader.dtype(name)).is_floating_point), torch.float32
        )
    return dtype


_DTYPE_FLAGS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def set_saved_dtype(config: Any, dtype: torch.dtype) -> None:
    """Say in a config, also in the flags of Qwen v1's, which precision the weights beside it have."""
    config.dtype = dtype
    if config.model_type == "qwen":
        for name, flag_dtype in _DTYPE_FLAGS.items():
            setattr(config, name, flag_dtype == dtype)
