"""The form of a base that an adapter was trained beside: its linear layers as they were quantised while loading.

``--q_lora`` quantises an unquantised checkpoint while it loads it, and trains the adapter beside the rounded weights.
Here the same weights are computed from the checkpoint, without loading the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from checkpoints.fold import WeightedAdapter
from checkpoints.model_config import Quantization, check_bitsandbytes, load_base_quantization
from checkpoints.packed_weights import dequantize_8bit
from checkpoints.source import TensorSource, View
from errors import ConfigError
from qwen_model.architectures import architecture_of

Read = Callable[[str], Tensor]
"""Name of a weight -> the weight [O, I] in float32, as it was in training."""


class TrainedForm(View):
    """A base whose linear layers have the weights that an adapter was trained beside.

    Args:
        below: the unquantised base.
        read: returns the weight that training used instead of one of ``below``.
        model_type: of the base; decides which weights are quantised.
    """

    def __init__(self, below: TensorSource, read: Read, model_type: str) -> None:
        super().__init__(below)
        architecture = architecture_of(model_type)
        layers = tuple(f".{name}.weight" for name in architecture.linear_layers)
        in_blocks = (name for name in below.names() if name.startswith(f"{architecture.blocks}."))
        self._quantized = {name for name in in_blocks if name.endswith(layers)}
        self._read, self._last = read, ("", torch.empty(0))
        self._measured: set[str] = set()
        self._squared_error = self._squared_value = 0.0

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        if name not in self._quantized:
            return self.below.rows(name, start, stop)
        if self._last[0] != name:
            self._last = name, self._read(name)
            self._measure(name, self._last[1])
        return self._last[1][start:stop]

    def _measure(self, name: str, weight: Tensor) -> None:
        if name not in self._measured:
            self._measured.add(name)
            plain = self.below.read(name).to(torch.float32)
            self._squared_error += float((weight - plain).square().sum(dtype=torch.float64))
            self._squared_value += float(plain.square().sum(dtype=torch.float64))

    def relative_error(self) -> float:
        """Return the norm of the difference from the base divided by the norm of the base, over the weights read."""
        return (self._squared_error / self._squared_value) ** 0.5 if self._squared_value else 0.0


def rounding_by(quantization: Quantization, base: TensorSource) -> Read:
    """Return a function that rounds weights of the base as bitsandbytes does while it loads a model."""
    if quantization.method == "int8":

        def read_int8(name: str) -> Tensor:
            weight = base.read(name).to(torch.float16).float()
            scales = weight.abs().amax(1).clamp(min=2**-24)
            return dequantize_8bit((weight * (127 / scales)[:, None]).round_(), scales)

        return read_int8
    check_bitsandbytes(f"the comparison with {quantization}")
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    def read_4bit(name: str) -> Tensor:
        weight = base.read(name)
        # As one long row: on a CPU bitsandbytes misreads rows that are not whole blocks.
        row = weight.contiguous().view(1, -1)
        packed, state = quantize_4bit(row, blocksize=64, compress_statistics=True, quant_type=quantization.method)
        state.dtype = torch.float32
        return dequantize_4bit(packed, state).to(torch.float32).view(weight.shape)

    return read_4bit


def quantization_to_match(adapters: Sequence[WeightedAdapter], base: Quantization | None) -> Quantization:
    """Return how the unquantised base was quantised in the training of all adapters, for ``--match_quantised_base``.

    Args:
        base: how the base's stored weights are quantised.

    Raises:
        ConfigError: there is nothing to match, or the adapters were trained beside different weights.
    """
    flag, without = "--match_quantised_base", "Remove the flag"
    if base is not None:
        raise ConfigError(f"{flag}: the base is stored as {base}, and its weights are taken as they are", without)
    trained = {each.adapter.folder: load_base_quantization(each.adapter.folder) for each in adapters}
    for folder, quantization in trained.items():
        if quantization is None:
            fix = f"{without}, or, if its base was a quantised checkpoint, name that with --base"
            raise ConfigError(f"{flag}: {folder} was not trained on a base that was quantised while loading", fix)
    if len({*trained.values()}) > 1:
        listed = ", ".join(f"{folder} ({quantization})" for folder, quantization in trained.items())
        raise ConfigError(f"{flag}: the adapters were trained beside different weights: {listed}", without)
    [matched] = {each for each in trained.values() if each is not None}
    check_bitsandbytes(f"{flag} with {matched}")
    return matched


def as_quantized(base: TensorSource, quantization: Quantization, model_type: str) -> TrainedForm:
    """Return a base with the weights that bitsandbytes computes with after quantising it."""
    return TrainedForm(base, rounding_by(quantization, base), model_type)
