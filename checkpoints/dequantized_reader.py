"""A quantised checkpoint read as if it were not: under the names of the plain one, in float32, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from checkpoints.files import load_json
from checkpoints.model_config import Quantization, find_quantization
from checkpoints.packed_weights import PARTS, dequantize_4bit, dequantize_8bit, unpack_weight, weight_shape
from checkpoints.shards import CheckpointReader, open_checkpoint
from checkpoints.source import TensorSource
from errors import ConfigError
from qwen_model.architectures import block_shapes

# Layers with a bias. auto-gptq wrote one, of zeros, for every layer that it quantised.
_BIASED = ("c_attn", "q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class _Layer:
    """A weight that is made of several tensors.

    Attributes:
        name: under which it is read.
        shape: [O, I].
        parts: the names of the tensors that it is made of.
    """

    name: str
    shape: tuple[int, ...]
    parts: list[str]
    read: Callable[[], Tensor]


class DequantizedReader(TensorSource):
    """The tensors of a quantised checkpoint, with weights in the place of what they are packed into.

    Args:
        dtype: what is told of a weight's precision; ``read`` gives it in float32, for the caller to round once.
        shapes: [O, I] of layers by the end of their names. Some quantisers fill up a layer to whole groups or words:
            what lies beyond these shapes is left out.

    Raises:
        ConfigError: a layer that lacks a part of its weight, or is smaller than its shape.
    """

    def __init__(
        self,
        packed: CheckpointReader,
        quantization: Quantization,
        dtype: torch.dtype,
        shapes: Mapping[str, tuple[int, int]] = MappingProxyType({}),
    ) -> None:
        self._packed, self._dtype = packed, dtype
        self._last: tuple[str, Tensor] | None = None
        layers = _find_layers(packed, quantization)
        self._layers = {layer.name: _cropped(layer, shapes) for layer in layers}
        parts = {part for layer in layers for part in layer.parts}
        plain = [name for name in packed.names() if name not in parts and not self._is_added_bias(name)]
        self._names = dict.fromkeys([*plain, *self._layers])

    def _is_added_bias(self, name: str) -> bool:
        layer, _, part = name.rpartition(".")
        if part != "bias" or f"{layer}.weight" not in self._layers or layer.rpartition(".")[2] in _BIASED:
            return False
        return not self._packed.read(name).any()

    def names(self) -> list[str]:
        return list(self._names)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._layers[name].shape if name in self._layers else self._packed.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype if name in self._layers else self._packed.dtype(name)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        if name not in self._layers:
            return self._packed.rows(name, start, stop)
        if self._last is None or self._last[0] != name:  # rows are asked for one after the other
            self._last = None
            self._last = name, self._layers[name].read()
        return self._last[1][start:stop]


def _find_layers(packed: CheckpointReader, quantization: Quantization) -> list[_Layer]:
    """The quantised layers of a checkpoint, each by the one tensor that tells it."""
    if quantization.is_packed:
        return [_packed_layer(packed, layer, quantization) for layer in _layers_with(packed, ".qweight")]
    if quantization.method == "int8":
        return [_8bit_layer(packed, layer) for layer in _layers_with(packed, ".SCB")]
    mark = f".weight.quant_state.bitsandbytes__{quantization.method}"
    return [_4bit_layer(packed, layer, mark) for layer in _layers_with(packed, mark)]


def _cropped(layer: _Layer, shapes: Mapping[str, tuple[int, int]]) -> _Layer:
    shape = shapes.get(".".join(layer.name.split(".")[-3:-1]), layer.shape)
    if layer.shape == shape:
        return layer
    if layer.shape[0] < shape[0] or layer.shape[1] < shape[1]:
        what = f"{layer.name} is {list(layer.shape)}, smaller than the {list(shape)} that config.json asks for"
        raise ConfigError(what, "Config and weights are not of one model: copy or download them again")
    return replace(layer, shape=shape, read=lambda: layer.read()[: shape[0], : shape[1]])


def _layers_with(packed: CheckpointReader, ending: str) -> list[str]:
    return [name.removesuffix(ending) for name in packed.names() if name.endswith(ending)]


def _packed_layer(packed: CheckpointReader, layer: str, quantization: Quantization) -> _Layer:
    parts = _present(packed, layer, [f".{part}" for part in PARTS], optional={".g_idx"})

    def read() -> Tensor:
        return unpack_weight({part.lstrip("."): packed.read(name) for part, name in parts.items()}, quantization)

    shape = weight_shape(packed.shape(f"{layer}.qweight"), quantization)
    return _Layer(f"{layer}.weight", shape, [*parts.values()], read)


def _4bit_layer(packed: CheckpointReader, layer: str, mark: str) -> _Layer:
    weight = f"{layer}.weight"
    nested = {".nested_absmax", ".nested_quant_map"}
    parts = _present(packed, weight, ["", ".absmax", ".quant_map", *sorted(nested)], optional=nested)
    state = json.loads(bytes(packed.read(layer + mark).tolist()))

    def read() -> Tensor:
        return dequantize_4bit({part: packed.read(name) for part, name in parts.items()}, state)

    return _Layer(weight, tuple(state["shape"]), [*parts.values(), layer + mark], read)


def _8bit_layer(packed: CheckpointReader, layer: str) -> _Layer:
    parts = _present(packed, layer, [".weight", ".SCB", ".weight_format"], optional={".weight_format"})

    def read() -> Tensor:
        return dequantize_8bit(packed.read(parts[".weight"]), packed.read(parts[".SCB"]))

    return _Layer(parts[".weight"], packed.shape(parts[".weight"]), [*parts.values()], read)


def _present(packed: CheckpointReader, layer: str, endings: list[str], optional: set[str]) -> dict[str, str]:
    """The names of a layer's tensors by how they end."""
    names = {ending: layer + ending for ending in endings if layer + ending in packed}
    missing = next((ending for ending in endings if ending not in names and ending not in optional), None)
    if missing is not None:
        what = f"{layer}{missing} is missing though {layer.removesuffix('.weight')} is quantised"
        raise ConfigError(what, "Copy or download the weights again")
    return names


def open_dequantized(folder: Path, dtype: torch.dtype) -> TensorSource:
    """The tensors of a checkpoint as those of the plain model, whether it is quantised or not.

    Args:
        dtype: what quantised weights are said to be in.

    Raises:
        ConfigError: weights that are missing, damaged, or quantised in a way that cannot be read.
    """
    reader, quantization = open_checkpoint(folder), find_quantization(folder)
    if quantization is None:
        return reader
    return DequantizedReader(reader, quantization, dtype, block_shapes(load_json(folder / "config.json")))
