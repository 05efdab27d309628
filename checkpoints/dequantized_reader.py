"""Read a quantised checkpoint as the unquantised one: same names, weights in float32, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from checkpoints.model_config import Quantization, find_quantization
from checkpoints.packed_weights import (
    PARTS,
    Header,
    check_4bit,
    check_8bit,
    check_group_indices,
    check_packed,
    dequantize_4bit,
    dequantize_8bit,
    parse_4bit_state,
    unpack_weight,
    weight_shape,
)
from checkpoints.shards import CheckpointReader, open_checkpoint
from checkpoints.source import TensorSource
from checkpoints.whole import load_text_config
from errors import ConfigError
from qwen_model.architectures import BIASED_LAYERS, block_shapes


@dataclass(frozen=True)
class _Layer:
    """A quantised weight [O, I].

    Attributes:
        name: of the unquantised weight.
        parts: names of the tensors in which it is stored.
        read: returns the weight in float32.
    """

    name: str
    shape: tuple[int, ...]
    parts: list[str]
    read: Callable[[], Tensor]


class DequantizedReader(TensorSource):
    """The tensors of a quantised checkpoint with dequantised weights instead of their stored parts.

    Args:
        dtype: reported as the dtype of dequantised weights; ``rows`` returns float32, for the caller to round once.
        shapes: [O, I] of layers by the end of their names, from config.json. Some quantisers pad a layer to whole
            groups or words: rows and columns beyond these shapes are dropped.

    Raises:
        ConfigError: a layer lacks a tensor or has one that does not fit the others, or its size
            is not that in ``shapes`` with such padding.
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
        self._layers = {layer.name: _without_padding(layer, shapes, quantization) for layer in layers}
        parts = {part for layer in layers for part in layer.parts}
        plain = [name for name in packed.names() if name not in parts and not self._is_added_bias(name)]
        self._names = dict.fromkeys([*plain, *self._layers])

    @property
    def is_quantized(self) -> bool:
        """Whether at least one weight in the files is quantised."""
        return bool(self._layers)

    def _is_added_bias(self, name: str) -> bool:
        """Return whether auto-gptq added this bias of zeros, as it did to every layer that it quantised."""
        layer, _, part = name.rpartition(".")
        if part != "bias" or f"{layer}.weight" not in self._layers or layer.rpartition(".")[2] in BIASED_LAYERS:
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
        if self._last is None or self._last[0] != name:  # the blocks of one tensor are read in sequence
            self._last = None
            self._last = name, self._layers[name].read()
        return self._last[1][start:stop]


def _find_layers(packed: CheckpointReader, quantization: Quantization) -> list[_Layer]:
    """Find the quantised layers of a checkpoint by the tensor that only quantised layers have."""
    if quantization.is_packed:
        return [_packed_layer(packed, layer, quantization) for layer in _layers_with(packed, ".qweight")]
    if quantization.method == "int8":
        return [_8bit_layer(packed, layer) for layer in _layers_with(packed, ".SCB")]
    state = f".weight.quant_state.bitsandbytes__{quantization.method}"
    return [_4bit_layer(packed, layer, layer + state) for layer in _layers_with(packed, state)]


def _without_padding(layer: _Layer, shapes: Mapping[str, tuple[int, int]], quantization: Quantization) -> _Layer:
    shape = shapes.get(".".join(layer.name.split(".")[-3:-1]), layer.shape)
    if layer.shape == shape:
        return layer
    unit = max(quantization.group_size, 32 // quantization.bits) if quantization.is_packed else 1
    pairs = list(zip(shape, layer.shape, strict=True))
    if not all(size <= stored <= -(-size // unit) * unit for size, stored in pairs):
        relation = "smaller" if any(stored < size for size, stored in pairs) else "larger"
        what = f"{layer.name} has the shape {list(layer.shape)}, {relation} than {list(shape)} of config.json"
        raise ConfigError(what, "Config and weights are of different models: copy or download them again")
    return replace(layer, shape=shape, read=lambda: layer.read()[: shape[0], : shape[1]])


def _layers_with(packed: CheckpointReader, ending: str) -> list[str]:
    return [name.removesuffix(ending) for name in packed.names() if name.endswith(ending)]


def _packed_layer(packed: CheckpointReader, layer: str, quantization: Quantization) -> _Layer:
    names = _find_parts(packed, layer, [f".{part}" for part in PARTS], optional={".g_idx"})
    parts = {part.lstrip("."): name for part, name in names.items()}
    headers = _headers(packed, parts)
    check_packed(layer, headers, quantization)
    if "g_idx" in parts:
        check_group_indices(parts["g_idx"], packed.read(parts["g_idx"]), headers["scales"][0][0])

    def read() -> Tensor:
        return unpack_weight({part: packed.read(name) for part, name in parts.items()}, quantization)

    shape = weight_shape(headers["qweight"][0], quantization)
    return _Layer(f"{layer}.weight", shape, [*parts.values()], read)


def _4bit_layer(packed: CheckpointReader, layer: str, state_name: str) -> _Layer:
    weight = f"{layer}.weight"
    nested = {".nested_absmax", ".nested_quant_map"}
    parts = _find_parts(packed, weight, ["", ".absmax", ".quant_map", *sorted(nested)], optional=nested)
    state = parse_4bit_state(state_name, packed.read(state_name))
    check_4bit(weight, _headers(packed, parts), state)

    def read() -> Tensor:
        return dequantize_4bit({part: packed.read(name) for part, name in parts.items()}, state)

    return _Layer(weight, tuple(state["shape"]), [*parts.values(), state_name], read)


def _8bit_layer(packed: CheckpointReader, layer: str) -> _Layer:
    parts = _find_parts(packed, layer, [".weight", ".SCB", ".weight_format"], optional={".weight_format"})
    check_8bit(layer, {part.lstrip("."): header for part, header in _headers(packed, parts).items()})

    def read() -> Tensor:
        return dequantize_8bit(packed.read(parts[".weight"]), packed.read(parts[".SCB"]))

    return _Layer(parts[".weight"], packed.shape(parts[".weight"]), [*parts.values()], read)


def _headers(packed: CheckpointReader, parts: Mapping[str, str]) -> dict[str, Header]:
    return {part: (packed.shape(name), packed.dtype(name)) for part, name in parts.items()}


def _find_parts(packed: CheckpointReader, layer: str, endings: list[str], optional: set[str]) -> dict[str, str]:
    """Return the names of a layer's tensors by ending; raise ``ConfigError`` if one that is not optional is missing."""
    names = {ending: layer + ending for ending in endings if layer + ending in packed}
    missing = next((ending for ending in endings if ending not in names and ending not in optional), None)
    if missing is not None:
        what = f"{layer}{missing} is missing, but {layer.removesuffix('.weight')} is quantised"
        raise ConfigError(what, "Copy or download the weights again")
    return names


def open_dequantized(folder: Path, dtype: torch.dtype) -> TensorSource:
    """Open a checkpoint, quantised or not, under the names of the unquantised model.

    Args:
        dtype: reported as the dtype of quantised weights.

    Raises:
        ConfigError: weights that are missing, damaged, or quantised in an unsupported way.
    """
    reader, quantization = open_checkpoint(folder), find_quantization(folder)
    packed = next((name for name in reader.names() if name.endswith(".qweight")), None)
    copy_again = "Copy config.json and all weight files again from the original checkpoint"
    if packed is not None and (quantization is None or not quantization.is_packed):
        raise ConfigError(f"{folder}: {packed} is quantised, but no config describes how", copy_again)
    if quantization is None:
        return reader
    source = DequantizedReader(reader, quantization, dtype, block_shapes(load_text_config(folder)))
    if not source.is_quantized:
        raise ConfigError(f"{folder}: its config names {quantization}, but no weight is quantised", copy_again)
    return source
