"""The model of a run without its weights: from config.json, on the meta device, with its adapter."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import TrainingArguments

from chat.families import QWEN_V1
from checkpoints.files import is_file
from checkpoints.model_config import find_quantization
from checkpoints.shards import open_checkpoint
from errors import ConfigError
from loading.checkpoint import Checkpoint, chat_format_of, load_config, load_generation_config, saved_dtype
from loading.config_files import find_local_folder
from loading.opening import library_errors
from loading.quantized import compute_in_float32
from planning.memory import is_loss
from planning.quantized import quantize_on_meta
from planning.sizes import ParameterSize
from qwen_model.architectures import architecture_of
from qwen_model.lean_models import model_class_of
from qwen_model.register import register_qwen
from training.config.args import RunArguments
from training.lora_checks import faults_of_patterns
from training.model import choose_embeddings, complete_model, weights_dtype

_COPY_AGAIN = "Copy config.json again from the original checkpoint"
_MOST_LAYERS = 1000
_WRAPPERS = re.compile(r"(^|\.)(base_model\.model|base_model|base_layer|original_module|module)(?=\.|$)")
_WITHIN_WRAPPERS = re.compile(r"\.(lora_\w+|token_adapter|modules_to_save)(\.|$)")


class _Tokenizer:
    """What the adapter and the batches need of a tokenizer. A rehearsal has no values, so any ids will do."""

    pad_token_id = eos_token_id = 0

    def convert_tokens_to_ids(self, token: str) -> int:
        return sum(token.encode()) % 100


def read_checkpoint(args: RunArguments) -> Checkpoint:
    """Read what config.json and generation_config.json tell of a checkpoint on this disk; headers, if there are any.

    Raises:
        ConfigError: no such folder, an unsupported model_type, or a config.json that cannot be used.
    """
    register_qwen()
    name = args.model.model_name_or_path
    folder = find_local_folder(name, args.model.cache_dir, args.model.model_hub)
    if folder.is_file():
        raise ConfigError(f"--model_name_or_path {name} is a file", f"Give its folder, {folder.parent}")
    if not is_file(folder / "config.json"):
        raise ConfigError(
            f"--model_name_or_path {name}: there is no config.json on this disk",
            "Give a folder that has one: a rehearsal needs no other file of a checkpoint",
        )
    try:
        config = load_config(folder, args.model.yarn)
        quantization = find_quantization(folder)
    except ConfigError as error:
        raise ConfigError(f"--model_name_or_path {error}") from error
    layers = config.num_hidden_layers
    if not isinstance(layers, int) or not 1 <= layers <= _MOST_LAYERS:
        what = f"--model_name_or_path {folder / 'config.json'}: num_hidden_layers is {layers}"
        raise ConfigError(what, f"Give 1 to {_MOST_LAYERS}")
    generation_config = load_generation_config(folder)
    return Checkpoint(
        name=name,
        folder=folder,
        config=config,
        tokenizer=_Tokenizer(),
        family=QWEN_V1,  # plain ChatML: a rehearsal has no texts, only rows for the tokens
        generation_config=generation_config,
        dtype=saved_dtype(open_checkpoint(folder) if _has_weights(folder) else None, config),
        chat_format=chat_format_of(config, generation_config),
        quantization=quantization,
        files={},
    )


def with_blocks(checkpoint: Checkpoint, blocks: int) -> Checkpoint:
    """Return a checkpoint with the first blocks of its model."""
    config = copy.deepcopy(checkpoint.config)
    config.num_hidden_layers = blocks
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:blocks]
    return replace(checkpoint, config=config)


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def build_model(checkpoint: Checkpoint, args: RunArguments, training_arguments: TrainingArguments) -> tuple[Any, int]:
    """Build the model that ``training.model.load_training_model`` loads, on the meta device.

    Returns:
        The model, and the number of weights of the base before they are quantised.
    Raises:
        ConfigError: values of config.json that contradict each other, an adapter that cannot be attached.
    """
    place = f"--model_name_or_path {checkpoint.folder / 'config.json'}"
    dtype = weights_dtype(training_arguments, args.lora.use_lora, args.options.pure_bf16)
    quantization = checkpoint.quantization or args.lora.quantization
    storage_dtype = checkpoint.dtype if quantization and dtype == torch.float32 else dtype
    config = copy.deepcopy(checkpoint.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    attention = args.model.attn_implementation
    if (attention or "").startswith("flash_attention"):
        attention = "sdpa"  # on CUDA torch's own flash attention, which keeps the same tensors
    arguments = {"attn_implementation": attention} if attention else {}
    with library_errors(place, _COPY_AGAIN), torch.device("meta"):
        model: Any = model_class_of(checkpoint.model_type)._from_config(config, dtype=storage_dtype, **arguments)
        model.tie_weights()
    model.eval()
    weights = sum(parameter.numel() for parameter in model.parameters())
    if quantization:
        if args.lora.use_dora:
            what = f"--use_dora on weights quantised as {quantization} cannot be rehearsed"
            raise ConfigError(what, "Rehearse it without --use_dora, which trains a value per row more")
        quantize_on_meta(model, checkpoint, quantization)
    if storage_dtype != dtype:
        compute_in_float32(model)
    with torch.device("meta"):
        model = complete_model(model, checkpoint, args, choose_embeddings(args.lora, checkpoint))
    if args.lora.use_lora:  # without weights their layers were not known before
        adapted = [name for module, name in module_names(model).items() if isinstance(module, LoraLayer)]
        for fault in faults_of_patterns(args.lora, adapted):
            raise fault
    if args.options.pure_bf16:  # on the meta device peft does not cast a new adapter to the base's dtype
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    return model, weights


def put_in_place(model: nn.Module) -> None:
    """Replace all tensors of a model on the meta device by tensors on the CPU; tied ones stay one tensor."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    made[id(tensor)] = tensor, _like(tensor)  # the old one too: its id must stay its own
                tensors[name] = made[id(tensor)][1]


def _like(tensor: Tensor) -> Tensor:
    values = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    return nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values


def module_names(model: nn.Module) -> Mapping[nn.Module, str]:
    """Return the modules of the base model with the names that they have without peft's wrappers."""
    names: dict[nn.Module, str] = {}
    for full_name, module in model.named_modules():
        if not _WITHIN_WRAPPERS.search(full_name):
            names[module] = _WRAPPERS.sub("", full_name).lstrip(".")
    return names


class Place(NamedTuple):
    """Where in a step something is allocated.

    Attributes:
        part: of the step, see ``Rehearsal.moments``.
        text: for messages.
    """

    part: str
    text: str


def place_of(model_type: str) -> Callable[[str, str], Place]:
    """Return a function of a phase and a module's name that names the place."""
    architecture = architecture_of(model_type)
    block = re.compile(rf"{re.escape(architecture.blocks)}\.(\d+)")

    def find(phase: str, name: str) -> Place:
        if is_loss(phase, name):
            part = "evaluation loss" if phase == "evaluation" else "loss"
            return Place(part, f"{part}, {phase}" if part == "loss" else part)
        if match := block.match(name):
            return Place(f"{phase}, block {match[1]}", f"{phase}, {name}")
        return Place(phase, f"{phase}, {name}" if name else phase)

    return find


def describe_parameters(model: nn.Module, model_type: str) -> tuple[ParameterSize, ...]:
    """Return all parameters and buffers of a model in their order, tied ones once."""
    block = re.compile(rf"(?:.*\.)?{re.escape(architecture_of(model_type).blocks)}\.(\d+)\.")
    described = []
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        match = block.match(name)
        number = int(match[1]) if match else None
        size = tensor.numel() * tensor.element_size()
        described.append(ParameterSize(name, tensor.numel(), size, tensor.requires_grad, number))
    return tuple(described)
