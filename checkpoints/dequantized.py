"""A quantised checkpoint read as if it were not: under the names of the plain one, in float32, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from checkpoints.dequantize import PARTS, dequantize, dequantize_4bit, dequantize_8bit
from checkpoints.quantization import Quantization, find_quantization
from checkpoints.shards import CheckpointReader, open_checkpoint
from errors import ConfigError

# Layers with a bias. auto-gptq wrote one, of zeros, for every layer that it quantised.
_BIASED = ("c_attn", "q_proj", "k_proj", "v_proj")
_STATE = ".weight.quant_state.bitsandbytes__"


@dataclass(frozen=True)
class _Layer:
    """A weight that is made of several tensors: its shape [O, I] and how it is read."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


class DequantizedReader(CheckpointReader):
    """The tensors of a quantised checkpoint, with weights in the place of what they are packed into.

    Args:
        dtype: what is told of a weight's precision; ``read`` gives it in float32, for the caller to round once.

    Raises:
        ConfigError: a layer that lacks a part of its weight, or a bias that the plain model has no place for.
    """

    def __init__(self, packed: CheckpointReader, quantization: Quantization, dtype: torch.dtype) -> None:
        self.files, self._packed, self._quantization, self._dtype = packed.files, packed, quantization, dtype
        self._layers: dict[str, _Layer] = {}
        parts: set[str] = set()
        for name in packed.names():
            found = self._find_layer(name)
            if found is not None:
                weight, layer, its_parts = found
                self._layers[weight] = layer
                parts |= its_parts
        quantised = {weight.removesuffix(".weight") for weight in self._layers}
        others = [name for name in packed.names() if name not in parts]
        plain = [name for name in others if not self._is_added_bias(name, quantised)]
        self._names = [*dict.fromkeys([*plain, *self._layers])]

    def _find_layer(self, name: str) -> tuple[str, _Layer, set[str]] | None:
        """The weight that a tensor is the first part of, and the names of all its parts."""
        packed, quantization = self._packed, self._quantization
        if quantization.is_packed and name.endswith(".qweight"):
            layer = name.removesuffix(".qweight")
            parts = {part: f"{layer}.{part}" for part in PARTS if f"{layer}.{part}" in packed}
            self._check_parts(layer, [f"{layer}.{part}" for part in PARTS[:3]])
            per_word = 32 // quantization.bits
            rows, columns = packed.shape(name)
            inputs, outputs = (rows, columns * per_word) if quantization.method == "awq" else (rows * per_word, columns)

            def read() -> Tensor:
                return dequantize({part: packed.read(stored) for part, stored in parts.items()}, quantization)

            return f"{layer}.weight", _Layer((outputs, inputs), read), set(parts.values())
        if quantization.method in ("nf4", "fp4") and _STATE in name:
            layer = name.partition(_STATE)[0]
            prefix = f"{layer}.weight"
            parts = {stored.removeprefix(prefix): stored for stored in packed.names() if stored.startswith(prefix)}
            self._check_parts(layer, [prefix, f"{prefix}.absmax", f"{prefix}.quant_map"])
            state = json.loads(bytes(packed.read(name).tolist()))
            return (
                prefix,
                _Layer(
                    tuple(state["shape"]),
                    lambda: dequantize_4bit({part: packed.read(stored) for part, stored in parts.items()}, state),
                ),
                set(parts.values()) - {prefix},
            )
        if quantization.method == "int8" and name.endswith(".SCB"):
            layer = name.removesuffix(".SCB")
            weight = f"{layer}.weight"
            self._check_parts(layer, [weight])
            parts_of = {name, f"{layer}.weight_format"}
            return (
                weight,
                _Layer(packed.shape(weight), lambda: dequantize_8bit(packed.read(weight), packed.read(name))),
                parts_of,
            )
        return None

    def _check_parts(self, layer: str, wanted: list[str]) -> None:
        missing = next((name for name in wanted if name not in self._packed), None)
        if missing is not None:
            raise ConfigError(f"{missing} is missing though {layer} is quantised", "Copy or download the weights again")

    def _is_added_bias(self, name: str, quantised: set[str]) -> bool:
        layer, _, part = name.rpartition(".")
        if part != "bias" or layer not in quantised or layer.rpartition(".")[2] in _BIASED:
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

    def read(self, name: str) -> Tensor:
        return self._layers[name].read() if name in self._layers else self._packed.read(name)


def open_dequantized(folder: Path, dtype: torch.dtype) -> CheckpointReader:
    """The tensors of a checkpoint as those of the plain model, whether it is quantised or not.

    Args:
        dtype: what quantised weights are said to be in.

    Raises:
        ConfigError: weights that are missing, damaged, or quantised in a way that cannot be read.
    """
    reader, quantization = open_checkpoint(folder), find_quantization(folder)
    return reader if quantization is None else DequantizedReader(reader, quantization, dtype)
