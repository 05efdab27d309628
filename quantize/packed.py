"""GPTQ and AWQ weights of a whole model, block by block.

A block is fitted to what the quantised blocks before it give, so that it makes up for a part of their error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints.model_config import Quantization
from checkpoints.packed_weights import IntegerWeight, pack_weight, unpack_weight
from checkpoints.shards import CheckpointReader
from errors import ConfigError
from quantize.awq import quantize_awq, search_scales
from quantize.blocks import (
    InputStatistics,
    Stream,
    measure_inputs,
    stored_tensors,
    take_blocks,
)
from quantize.gptq import quantize_gptq
from qwen_model.architectures import LinearGroup, architecture_of
from qwen_model.block_runner import architecture_of_model, blocks_of

Groups = Sequence[LinearGroup]
Parts = dict[str, Tensor]

NF4_BLOCK = 64
"""Weights that share a scale in bitsandbytes."""

_TOO_NARROW = "The layers of this model cannot be quantised so"


def check_sizes(reader: CheckpointReader, model_type: str, quantization: Quantization) -> None:
    """Raise ``ConfigError`` unless every layer that is to be quantised consists of whole groups and words."""
    if not quantization.is_packed:
        _check_rows(reader, model_type)
        return
    per_word = 32 // quantization.bits
    for name, (outputs, inputs) in _shapes(reader, model_type).items():
        if inputs % quantization.group_size:
            sizes = [size for size in (128, 64, 32) if inputs % size == 0]
            raise ConfigError(
                f"--group_size {quantization.group_size} does not divide the {inputs} inputs of {name}",
                f"Give --group_size {sizes[0]}" if sizes else _TOO_NARROW,
            )
        if outputs % per_word:
            raise ConfigError(
                f"--bits {quantization.bits} needs layers with a multiple of {per_word} outputs, {name} has {outputs}",
                _TOO_NARROW,
            )


def _check_rows(reader: CheckpointReader, model_type: str) -> None:
    """On a CPU bitsandbytes reads rows that do not consist of whole blocks back as other numbers than it was given."""
    for name, (_, inputs) in _shapes(reader, model_type).items():
        if inputs % NF4_BLOCK and not torch.cuda.is_available():
            raise ConfigError(
                f"--format nf4 needs layers with a multiple of {NF4_BLOCK} inputs on a CPU, {name} has {inputs}",
                "Give --format gptq or awq",
            )


def most_inputs(reader: CheckpointReader, model_type: str) -> int:
    """Inputs of the widest layer that is quantised."""
    return max((inputs for _, inputs in _shapes(reader, model_type).values()), default=0)


def _shapes(reader: CheckpointReader, model_type: str) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of the first block's layers; what is missing is reported by whoever loads the weights."""
    architecture = architecture_of(model_type)
    names = {name: f"{architecture.blocks}.0.{name}.weight" for name in architecture.linear_layers}
    shapes = {name: reader.shape(weight) for name, weight in names.items() if weight in reader}
    return {name: (shape[0], shape[1]) for name, shape in shapes.items()}


def quantize_weights(
    model: Any, quantization: Quantization, calibration: Stream, held_out: Stream, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the quantised model by their names, on the CPU. The model's own blocks are gone afterwards.

    Args:
        model: as ``loading.checkpoint.load_model`` gives it, on the CPU.
        calibration: goes through the quantised blocks.
        held_out: goes through the blocks as they were.
        dtype: of what is not quantised.

    Raises:
        RunError: weights or inputs that cannot be quantised, see ``quantize.gptq``.
    """
    architecture, last = architecture_of_model(model), len(blocks_of(model)) - 1
    quantize = _quantize_gptq if quantization.method == "gptq" else _quantize_awq
    for index, block in take_blocks(model, calibration.device, "Quantising"):
        held_out.pass_through(index, block)
        packed = quantize(block, index, calibration, architecture.linear_groups, quantization, dtype)
        if index < last:
            calibration.pass_through(index, block)
        prefix = f"{architecture.blocks}.{index}"
        for tensor_name, tensor in block.state_dict().items():
            layer = tensor_name.removesuffix(".weight")
            if layer in packed:
                yield from ((f"{prefix}.{layer}.{part}", value) for part, value in packed[layer].items())
            else:
                yield f"{prefix}.{tensor_name}", tensor.to("cpu", dtype)
    for name, tensor in stored_tensors(model):
        yield name, tensor.to("cpu", dtype)


def _linear(block: nn.Module, name: str) -> nn.Linear:
    layer = block.get_submodule(name)
    assert isinstance(layer, nn.Linear), f"{name} is no linear layer"
    return layer


def _quantize_gptq(
    block: nn.Module, index: int, stream: Stream, groups: Groups, quantization: Quantization, dtype: torch.dtype
) -> dict[str, Parts]:
    """Quantise the layers of a block in place, each fitted to the quantised ones before it."""
    packed = {}
    for group in groups:
        inputs = measure_inputs(stream, index, block, group.layers[:1])[group.layers[0]]
        for name in group.layers:
            layer = _linear(block, name)
            rounded = quantize_gptq(layer.weight, inputs.gram, quantization.bits, quantization.group_size)
            packed[name] = _put(rounded, layer, quantization)
    return packed


def _quantize_awq(
    block: nn.Module, index: int, stream: Stream, groups: Groups, quantization: Quantization, dtype: torch.dtype
) -> dict[str, Parts]:
    """Scale and quantise the layers of a block in place."""
    statistics = measure_inputs(stream, index, block, [group.layers[0] for group in groups])
    for group in groups:
        if group.scaled_by is not None:
            inputs, layers = statistics[group.layers[0]], [_linear(block, name) for name in group.layers]
            scales = search_scales(
                [layer.weight for layer in layers], inputs.gram, inputs.sizes, quantization.group_size
            )
            _move_scales(block.get_submodule(group.scaled_by), layers, inputs, scales, dtype)
    packed = {}
    for group in groups:
        inputs = statistics[group.layers[0]]
        for name in group.layers:
            layer = _linear(block, name)
            packed[name] = _put(quantize_awq(layer.weight, inputs.gram, quantization.group_size), layer, quantization)
    return packed


@torch.no_grad()
def _move_scales(
    before: Any, layers: list[nn.Linear], inputs: InputStatistics, scales: Tensor, dtype: torch.dtype
) -> None:
    """Divide the output of one layer by ``scales`` [I] and multiply the columns of the next ones by them."""
    if before.weight.dim() == 1:
        # The norm is stored in ``dtype``: what it can hold decides what the scales are.
        divided = (before.weight / scales).to(dtype).float()
        is_kept = (before.weight != 0) & (divided != 0) & divided.isfinite()
        scales = torch.where(is_kept, before.weight / divided, 1)
        before.weight.copy_(torch.where(is_kept, divided, before.weight))
    else:
        before.weight.div_(scales[:, None])
        if before.bias is not None:
            before.bias.div_(scales)
    for layer in layers:
        layer.weight.mul_(scales)
    inputs.gram.div_(scales[:, None]).div_(scales)


@torch.no_grad()
def _put(rounded: IntegerWeight, layer: nn.Linear, quantization: Quantization) -> Parts:
    """Give a layer the weight that will be read from its packed parts, and return these."""
    parts = pack_weight(rounded, quantization)
    layer.weight.copy_(unpack_weight(parts, quantization))
    return parts
