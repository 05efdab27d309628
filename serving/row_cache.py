"""Keys and values, or states, of a batch whose rows come and go.

Rows are padded on the left, so that the newest tokens of all rows are in the last column.

Shapes: B rows, H heads of keys and values, L columns, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer

from qwen_model.kv_cache import build_layers, layer_class

_BLOCK = 64  # columns by which buffers grow, at least


class RowLayer(DynamicLayer):
    """A layer's keys and values in buffers with room: a step writes one column instead of copying all of them.

    Layers with a sliding window keep all columns, too; the mask of the batch hides those outside of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._buffers: list[Tensor] = []
        self._start = self._end = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append columns, and return all keys and values, [B, H, L, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers = [key_states[:, :, :0], value_states[:, :, :0]]
        count = key_states.shape[-2]
        if self._end + count > self._buffers[0].shape[-2]:
            length = self._end - self._start
            self._rebuild(length + count + max(_BLOCK, (length + count) // 4))
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, self._end : self._end + count] = states
        self._end += count
        return self._show()

    def join(self, other: RowLayer, padding: int, other_padding: int) -> None:
        """Append the rows of another layer below these.

        Args:
            padding, other_padding: columns of zeros that precede the tokens of these and of the other rows.
        """
        length = self._end - self._start + padding
        joined = []
        for own, others in zip(self._show(), other._show(), strict=True):
            buffer = own.new_zeros(len(own) + len(others), own.shape[1], length + _BLOCK, own.shape[3])
            buffer[: len(own), :, padding:length] = own
            buffer[len(own) :, :, other_padding:length] = others.to(own.device)
            joined.append(buffer)
        self._buffers, self._start, self._end = joined, 0, length
        self._show()

    def cut_left(self, columns: int) -> None:
        """Remove the oldest columns of all rows."""
        self._start += columns
        self._show()

    def batch_select_indices(self, indices: Tensor) -> None:
        self._buffers = [buffer[indices.to(buffer.device)] for buffer in self._buffers]
        self._show()

    def _rebuild(self, capacity: int) -> None:
        """Move the columns to the beginning of new buffers of a capacity."""
        length = self._end - self._start
        moved = []
        for buffer in self._buffers:
            larger = buffer.new_zeros(buffer.shape[0], buffer.shape[1], capacity, buffer.shape[3])
            larger[:, :, :length] = buffer[:, :, self._start : self._end]
            moved.append(larger)
        self._buffers, self._start, self._end = moved, 0, length

    def _show(self) -> tuple[Tensor, Tensor]:
        keys, values = (buffer[:, :, self._start : self._end] for buffer in self._buffers)
        self.keys, self.values = keys, values
        return keys, values


class StateLayer(LinearAttentionLayer):
    """What a delta net carries from token to token: a state and the newest inputs of its convolution, for each row.

    They have no columns. Padding leaves them at zero, because the net's input is zero there.
    """

    def join(self, other: StateLayer, padding: int, other_padding: int) -> None:
        """Append the rows of another layer below these."""
        pairs: Any = (self.conv_states, other.conv_states), (self.recurrent_states, other.recurrent_states)
        for own, others in pairs:
            own[0] = torch.cat((own[0], others[0].to(own[0].device)))

    def cut_left(self, columns: int) -> None:
        """Keep what there is: the oldest columns of all rows are padding."""

    def batch_select_indices(self, indices: Tensor) -> None:
        states: Any
        for states in (self.conv_states, self.recurrent_states):
            states[0] = states[0][indices.to(states[0].device)]


def build_row_cache(config: Any, kind: str | None = None) -> Cache:
    """Build the empty cache of a batch.

    Args:
        config: of the model.
        kind: ``int8`` or ``fp8``; ``None``: the precision of the model.
    """
    return Cache(layers=build_layers(config, RowLayer if kind is None else layer_class(kind), StateLayer))


def join_caches(cache: Cache, other: Cache, padding: int, other_padding: int) -> None:
    """Append the rows of one cache to another, with columns of zeros before the tokens of each."""
    layers: Any
    for layers in zip(cache.layers, other.layers, strict=True):
        layers[0].join(layers[1], padding, other_padding)


def keep_rows(cache: Cache, indices: list[int], columns: int) -> None:
    """Keep some rows of a cache, without its ``columns`` oldest columns."""
    layer: Any
    chosen = torch.tensor(indices)
    for layer in cache.layers:
        layer.batch_select_indices(chosen)
        if columns:
            layer.cut_left(columns)
