"""Caches of keys and values in 8 bits per number, as layers of transformers' cache, for every family.

A key or value is one row of bytes: its codes, then the few numbers that turn them back into values. Each is quantised
once, on its own, so what a row of the batch reads depends neither on other rows nor on padding. Only one layer's
values exist in full at a time, while its attention runs; the states of the current call are attended to as they are.

Shapes: B rows of the batch, H heads of keys and values, T cached tokens, t tokens of this call, D head size.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from errors import ConfigError

CacheKind = Literal["int8", "fp8"]

_FP8 = torch.float8_e4m3fn


class EightBitLayer(DynamicLayer):
    """One layer's keys and values as bytes.

    Attributes:
        keys, values: uint8 [B, H, T, D + bytes of the parameters]; what transformers does to rows and lengths of a
            layer applies to them unchanged.
        parameters: how many numbers, in the dtype of the states, follow the codes of a key or value.
    """

    parameters: ClassVar[int]

    @abstractmethod
    def quantize(self, states: Tensor) -> tuple[Tensor, ...]:
        """Return the codes of states [B, H, t, D] as uint8, and their parameters [B, H, t, 1] in the states' dtype."""

    @abstractmethod
    def dequantize(self, codes: Tensor, *parameters: Tensor) -> Tensor:
        """Return the values of codes [B, H, T, D] in float32; the parameters [B, H, T, 1] are float32, too."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        # Not by the parent: its parameters are others in transformers 4, where an exported folder may run.
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.keys, self.values = (torch.tensor([], dtype=torch.uint8, device=self.device) for _ in range(2))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add the states of a call, and return all states in their dtype."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        packed_keys, packed_values = _states(self)
        keys, values = self._with_cached(packed_keys, key_states), self._with_cached(packed_values, value_states)
        self.keys = torch.cat([packed_keys, self._pack(key_states)], dim=-2)
        self.values = torch.cat([packed_values, self._pack(value_states)], dim=-2)
        return keys, values

    def join(self, other: EightBitLayer, padding: int, other_padding: int) -> None:
        """Append the rows of another layer below these.

        Args:
            padding, other_padding: columns of zeros that precede the tokens of these and of the other rows.
        """
        kept = []
        for own, others in zip(_states(self), _states(other), strict=True):
            rows = F.pad(own, (0, 0, padding, 0)), F.pad(others.to(own.device), (0, 0, other_padding, 0))
            kept.append(torch.cat(rows))
        self.keys, self.values = kept

    def cut_left(self, columns: int) -> None:
        """Remove the oldest columns of all rows."""
        # A copy, because a part of a tensor would keep the memory of the whole.
        self.keys, self.values = (states[:, :, columns:].contiguous() for states in _states(self))

    def _pack(self, states: Tensor) -> Tensor:
        codes, *parameters = self.quantize(states.detach())
        return torch.cat([codes, *(parameter.contiguous().view(torch.uint8) for parameter in parameters)], dim=-1)

    def _with_cached(self, packed: Tensor, states: Tensor) -> Tensor:
        """Return cached states, followed by those of this call, [B, H, T + t, D]."""
        cached = self.get_seq_length()
        if not cached:
            return states
        size = states.shape[-1]
        parameters = packed[..., size:].contiguous().view(states.dtype).float().split(1, dim=-1)
        whole = states.new_empty(*states.shape[:2], cached + states.shape[2], size)
        whole[:, :, :cached] = self.dequantize(packed[..., :size], *parameters)
        whole[:, :, cached:] = states
        return whole


class Int8Layer(EightBitLayer):
    """256 equal steps between the smallest and the largest number of a key or value.

    The original's cache has the same codes, with differences that only reduce the error: it cuts codes off instead of
    rounding them, shares scale and zero point among all tokens of a call, and fails on constant states.
    """

    parameters = 2  # size of a step, smallest number

    def quantize(self, states: Tensor) -> tuple[Tensor, ...]:
        low, high = states.amin(-1, keepdim=True), states.amax(-1, keepdim=True)
        step = _round_up((high.float() - low.float()) / 255, states.dtype)
        codes = (states.float() - low.float()).div_(step.float()).round_().clamp_(0, 255)
        return codes.to(torch.uint8), step, low

    def dequantize(self, codes: Tensor, *parameters: Tensor) -> Tensor:
        step, low = parameters
        return codes.float().mul_(step).add_(low)


class Fp8Layer(EightBitLayer):
    """Numbers of 4 exponent and 3 mantissa bits; a key or value is scaled to the range of the format."""

    parameters = 1  # scale

    def quantize(self, states: Tensor) -> tuple[Tensor, ...]:
        largest = states.abs().amax(-1, keepdim=True).float()
        scale = _round_up(largest / torch.finfo(_FP8).max, states.dtype)
        return (states.float() / scale.float()).to(_FP8).view(torch.uint8), scale

    def dequantize(self, codes: Tensor, *parameters: Tensor) -> Tensor:
        (scale,) = parameters
        if codes.device.type == "cpu":  # where looking the values up takes a fifth of the time of a conversion
            return _fp8_values().index_select(0, codes.flatten().int()).view(codes.shape).mul_(scale)
        return codes.view(_FP8).float().mul_(scale)


@lru_cache
def _fp8_values() -> Tensor:
    """Return the numbers of all 256 codes."""
    return torch.arange(256, dtype=torch.uint8).view(_FP8).float()


def _round_up(step: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float32 steps in ``dtype``, positive and not smaller than they are: no state is beyond the last code."""
    limits = torch.finfo(dtype)
    return (step * (1 + limits.eps / 2)).to(dtype).clamp_(min=limits.tiny)


_LAYERS: dict[str | None, type[DynamicLayer]] = {None: DynamicLayer, "int8": Int8Layer, "fp8": Fp8Layer}

CACHE_KINDS = tuple(kind for kind in _LAYERS if kind is not None)


def build_cache(config: Any, kind: str | None = None) -> Cache:
    """Build an empty cache for ``generate(past_key_values=...)`` or ``forward``.

    Args:
        config: of the model.
        kind: ``int8`` or ``fp8``; ``None`` keeps the states as they are.

    Raises:
        ConfigError: another kind.
    """
    return Cache(layers=build_layers(config, layer_class(kind)))


def layer_class(kind: str | None) -> type[DynamicLayer]:
    """Return the class of a layer with keys and values of a kind.

    Raises:
        ConfigError: an unknown kind.
    """
    if kind not in _LAYERS:
        raise ConfigError(f"--kv_cache {kind} is not a kind of cache", f"Use {' or '.join(CACHE_KINDS)}")
    return _LAYERS[kind]


def build_layers(config: Any, of_attention: type[DynamicLayer], of_states: Any = None) -> list[Any]:
    """Build the layers of a cache, one for each block.

    Args:
        of_attention: class of layers with keys and values.
        of_states: class of layers with the state of a delta net; ``None``: transformers'. No kind changes it: its
            size does not depend on the number of tokens.
    """
    # A layer with a sliding window keeps what left the window: rows of different lengths are joined, masks hide it.
    types = getattr(config, "layer_types", None) or ()
    if "linear_attention" not in types:
        return [of_attention() for _ in range(config.num_hidden_layers)]
    from transformers.cache_utils import LinearAttentionLayer  # not in transformers 4, where an exported folder may run

    return [(of_states or LinearAttentionLayer)() if each == "linear_attention" else of_attention() for each in types]


def cache_bytes(cache: Cache) -> int:
    """Return the bytes of a cache's keys and values."""
    held = [layer for layer in cache.layers if isinstance(layer, DynamicLayer) and cache.get_seq_length()]
    return sum(states.nbytes for layer in held for states in _states(layer))


def _states(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.keys, layer.values
