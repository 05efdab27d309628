"""Quantise the weights of a whole model with GPTQ, block by block, for the file formats of GPTQ and AWQ.

A block is calibrated on the outputs of the quantised blocks before it, so that it compensates for part of their error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from checkpoints.model_config import Quantization
from checkpoints.packed_weights import IntegerWeight, pack_weight, unpack_weight
from checkpoints.shards import CheckpointReader
from errors import ConfigError
from quantize.blocks import SampleStates, measure_gram, pop_blocks, stored_tensors
from quantize.gptq import quantize_gptq
from quantize.rounding import relative_error, round_to_nearest
from qwen_model.architectures import architecture_of
from qwen_model.block_runner import architecture_of_model, blocks_of

NF4_BLOCK = 64
"""Weights that share a scale in bitsandbytes."""

_UNSUPPORTED = "The layers of this model cannot be quantised this way"


def check_sizes(reader: CheckpointReader, model_type: str, quantization: Quantization) -> None:
    """Raise ``ConfigError`` unless each layer to be quantised consists of whole groups and words, or NF4 blocks."""
    per_word = 32 // quantization.bits
    for name, (outputs, inputs) in _shapes(reader, model_type).items():
        if not quantization.is_packed:
            # On a CPU bitsandbytes misreads rows that do not consist of whole blocks.
            if inputs % NF4_BLOCK and not torch.cuda.is_available():
                raise ConfigError(
                    f"--format nf4 needs layers with a multiple of {NF4_BLOCK} inputs on a CPU, {name} has {inputs}",
                    "Give --format gptq or awq",
                )
        elif inputs % quantization.group_size:
            sizes = [size for size in (128, 64, 32) if inputs % size == 0]
            raise ConfigError(
                f"--group_size {quantization.group_size} does not divide the {inputs} inputs of {name}",
                f"Give --group_size {sizes[0]}" if sizes else _UNSUPPORTED,
            )
        elif outputs % per_word:
            raise ConfigError(
                f"--bits {quantization.bits} needs layers with a multiple of {per_word} outputs, {name} has {outputs}",
                _UNSUPPORTED,
            )


def max_inputs(reader: CheckpointReader, model_type: str) -> int:
    """Return the number of inputs of the widest layer to be quantised."""
    return max((inputs for _, inputs in _shapes(reader, model_type).values()), default=0)


def _shapes(reader: CheckpointReader, model_type: str) -> dict[str, tuple[int, int]]:
    """(O, I) of the first block's linear layers; missing ones are reported when the weights are loaded."""
    architecture = architecture_of(model_type)
    names = {name: f"{architecture.blocks}.0.{name}.weight" for name in architecture.linear_layers}
    shapes = {name: reader.shape(weight) for name, weight in names.items() if weight in reader}
    return {name: (shape[0], shape[1]) for name, shape in shapes.items()}


@dataclass
class Measurements:
    """What is measured while the blocks of a model are quantised.

    Attributes:
        original: held-out samples, advanced through the original blocks.
        nearest: the same samples, advanced through blocks whose weights are rounded to nearest.
        errors: of each quantised layer: the norm of the change of its outputs on the calibration data, relative to that
            of the outputs.
    """

    original: SampleStates
    nearest: SampleStates
    errors: dict[str, float] = field(default_factory=dict)


def quantize_weights(
    model: Any, quantization: Quantization, calibration: SampleStates, measured: Measurements, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield the (name, tensor) pairs of the quantised model, on the CPU. The model's blocks are freed on the way.

    Args:
        model: on the CPU, from ``loading.checkpoint.load_model``.
        calibration: advanced through the quantised blocks.
        dtype: of the tensors that are not quantised.

    Raises:
        RunError: weights or inputs that cannot be quantised, see ``quantize.gptq``.
    """
    architecture, last = architecture_of_model(model), len(blocks_of(model)) - 1
    for index, block in pop_blocks(model, calibration.device, "Quantising"):
        measured.original.advance(index, block)
        with _rounded_to_nearest(block, architecture.linear_layers, quantization):
            measured.nearest.advance(index, block)
        packed = _quantize_block(index, block, architecture.linear_groups, calibration, quantization)
        if index < last:
            calibration.advance(index, block)
        prefix = f"{architecture.blocks}.{index}"
        measured.errors.update((f"{prefix}.{name}", layer.error) for name, layer in packed.items())
        for tensor_name, tensor in block.state_dict().items():
            layer = tensor_name.removesuffix(".weight")
            if layer in packed:
                yield from ((f"{prefix}.{layer}.{part}", value) for part, value in packed[layer].parts.items())
            else:
                yield f"{prefix}.{tensor_name}", tensor.to("cpu", dtype)
    for name, tensor in stored_tensors(model):
        yield name, tensor.to("cpu", dtype)


@contextmanager
def _rounded_to_nearest(block: nn.Module, names: Sequence[str], quantization: Quantization) -> Iterator[None]:
    """Round the weights of a block's layers to nearest, as many bits in groups of the same size, and restore them."""
    layers: list[Any] = [block.get_submodule(name) for name in names]
    originals = [layer.weight.detach().clone() for layer in layers]
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(round_to_nearest(layer.weight, quantization.bits, quantization.group_size))
        yield
        for layer, original in zip(layers, originals, strict=True):
            layer.weight.copy_(original)


class _Packed(NamedTuple):
    """A quantised layer: its tensors by the names in ``packed_weights.PARTS``, and see ``Measurements.errors``."""

    parts: dict[str, Tensor]
    error: float


def _quantize_block(
    index: int,
    block: nn.Module,
    groups: Sequence[Sequence[str]],
    calibration: SampleStates,
    quantization: Quantization,
) -> dict[str, _Packed]:
    """Quantise the layers of block ``index`` in place, each calibrated on the quantised layers before it."""
    packed = {}
    for group in groups:
        gram = measure_gram(calibration, index, block, group[0])
        for name, layer in _linear_layers(block, group).items():
            weight = quantize_gptq(layer.weight, gram, calibration.num_tokens, quantization)
            packed[name] = _set_weight(layer, weight, gram, quantization)
    return packed


def _linear_layers(block: nn.Module, group: Sequence[str]) -> dict[str, nn.Linear]:
    layers = {}
    for name in group:
        layer = block.get_submodule(name)
        assert isinstance(layer, nn.Linear), f"{name} is not a linear layer"
        layers[name] = layer
    return layers


@torch.no_grad()
def _set_weight(layer: nn.Linear, weight: IntegerWeight, gram: Tensor, quantization: Quantization) -> _Packed:
    """Pack a weight, and set the layer's weight to what its parts unpack to."""
    parts = pack_weight(weight, quantization)
    original = layer.weight.detach().clone()
    layer.weight.copy_(unpack_weight(parts, quantization))
    return _Packed(parts, relative_error(original, layer.weight, gram))
