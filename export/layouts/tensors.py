"""Qwen v1's weights under Qwen2's names and back, as views: no value changes.

Qwen v1 computes the same as Qwen2 with as many key-value heads as heads, up to the length it was trained with. So a
checkpoint in Qwen2's layout opens wherever Qwen2 does, without custom code. Packed layers (GPTQ, AWQ) are split and
joined along their columns, which are the outputs.

Shapes: H hidden size; ``c_attn.weight`` is [3H, H], its bias [3H].
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from checkpoints.source import TensorSource, View
from errors import ConfigError
from export.layouts.qwen2_names import module_in_qwen, modules_in_qwen2
from qwen_model.architectures import is_computed

# Axis of the layer's outputs in each of its tensors; ``g_idx`` has inputs only.
_OUTPUT_AXIS = {"weight": 0, "bias": 0, "qweight": 1, "qzeros": 1, "scales": 1, "g_idx": None}
_PACKED_WORDS = ("qweight", "qzeros")  # several outputs may share one word
_COPY_AGAIN = "Copy config.json and all weight files again from the original checkpoint"


@dataclass(frozen=True)
class _Slice:
    """Indices ``start`` to ``stop`` of a tensor along its output axis."""

    name: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class _ConvertedTensors(View):
    """Tensors concatenated from slices of the tensors below; without an output axis, the first slice's tensor."""

    def __init__(self, below: TensorSource, slices: Mapping[str, list[_Slice]]) -> None:
        super().__init__(below)
        self._slices = slices

    def names(self) -> list[str]:
        return list(self._slices)

    def __contains__(self, name: str) -> bool:
        return name in self._slices

    def shape(self, name: str) -> tuple[int, ...]:
        slices, axis = self._slices[name], _output_axis(name)
        shape = list(self.below.shape(slices[0].name))
        if axis is not None:
            shape[axis] = sum(map(len, slices))
        return tuple(shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.below.dtype(self._slices[name][0].name)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        slices, axis = self._slices[name], _output_axis(name)
        if axis is None:
            return self.below.rows(slices[0].name, start, stop)
        if axis == 1:
            parts = [self.below.rows(part.name, start, stop)[:, part.start : part.stop] for part in slices]
        else:
            parts = [*self._output_rows(slices, *slice(start, stop).indices(self.shape(name)[0])[:2])]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis)

    def _output_rows(self, slices: list[_Slice], start: int, stop: int) -> Iterator[Tensor]:
        """Yield rows ``start`` to ``stop`` of the concatenated slices."""
        first = 0  # of the slice, in the concatenation
        for part in slices:
            begin, end = max(start - first, 0), min(stop - first, len(part))
            if begin < end:
                yield self.below.rows(part.name, part.start + begin, part.start + end)
            first += len(part)


def tensors_to_qwen2(source: TensorSource, config: Mapping[str, Any]) -> TensorSource:
    """Return a view of a Qwen v1 checkpoint's tensors under Qwen2's names.

    Args:
        config: the checkpoint's config.json.

    Raises:
        ConfigError: tensors without a counterpart in Qwen2, or with shapes that contradict the config; weights packed
            by bitsandbytes, whose quantisation blocks do not end at row boundaries.
    """
    hidden = _hidden_size(config)
    slices: dict[str, list[_Slice]] = {}
    for name in _convertible(source, "c_attn"):
        module, _, part = name.rpartition(".")
        new_modules = modules_in_qwen2(module)
        if not new_modules or part not in _OUTPUT_AXIS:
            raise _no_counterpart(name, "Qwen2")
        size, axis = _output_size(source, name), _OUTPUT_AXIS[part]
        if len(new_modules) == 3 and axis is not None:
            _check_divisible(source, name, hidden)
        third = size // len(new_modules)
        for index, new in enumerate(new_modules):
            slices[f"{new}.{part}"] = [_Slice(name, index * third, (index + 1) * third)]
    return _ConvertedTensors(source, slices)


def tensors_to_qwen(source: TensorSource, config: Mapping[str, Any]) -> TensorSource:
    """Return a view of a Qwen2 checkpoint's tensors under Qwen v1's names.

    Args:
        config: the checkpoint's config.json.

    Raises:
        ConfigError: tensors without a counterpart in Qwen v1, or with shapes that contradict the config; q, k and v
            that cannot be joined into one layer.
    """
    hidden = _hidden_size(config)
    slices: dict[str, list[_Slice]] = {}
    for name in _convertible(source, "q_proj", "k_proj", "v_proj"):
        module, _, part = name.rpartition(".")
        counterpart = module_in_qwen(module)
        if counterpart is None or part not in _OUTPUT_AXIS:
            raise _no_counterpart(name, "Qwen v1")
        new, qkv_index = counterpart
        if qkv_index is None:
            slices[f"{new}.{part}"] = [_Slice(name, 0, _output_size(source, name))]
        elif f"{new}.{part}" not in slices:
            parts = [f"{module[: -len('q_proj')]}{letter}_proj.{part}" for letter in "qkv"]
            _check_joinable(source, parts, hidden)
            slices[f"{new}.{part}"] = [_Slice(each, 0, _output_size(source, each)) for each in parts]
    return _ConvertedTensors(source, slices)


def _output_axis(name: str) -> int | None:
    return _OUTPUT_AXIS[name.rpartition(".")[2]]


def _output_size(source: TensorSource, name: str) -> int:
    """Return the length of a tensor's output axis, in words if it is packed; 0 without such an axis."""
    axis = _output_axis(name)
    return 0 if axis is None else source.shape(name)[axis]


def _hidden_size(config: Mapping[str, Any]) -> int:
    size = config.get("hidden_size", config.get("n_embd"))
    if not isinstance(size, int):
        raise ConfigError(f"config.json: hidden_size is {size!r}", _COPY_AGAIN)
    return size


def _convertible(source: TensorSource, *with_bias: str) -> list[str]:
    """Return the tensors to convert: all but computed tables and biases of zeros.

    Args:
        with_bias: ends of the names of the modules that have a bias in the source's layout.

    Raises:
        ConfigError: weights packed by bitsandbytes, or a bias that is not zero in any other module.
    """
    names = [name for name in source.names() if not is_computed(name)]
    if packed := next((name for name in names if re.search(r"\.(SCB|weight_format|weight\..+)$", name)), None):
        raise ConfigError(
            f"{packed}: weights packed by bitsandbytes cannot be converted",
            "Convert the unquantised checkpoint, or give --dtype to dequantise this one",
        )

    def is_added_bias(name: str) -> bool:
        # auto-gptq wrote a bias of zeros for every layer that it quantised.
        module, _, part = name.rpartition(".")
        return part == "bias" and not module.endswith(with_bias)

    for name in filter(is_added_bias, names):
        if source.read(name).any():
            what = f"{name} is not zero, but the layer's counterpart has no bias"
            raise ConfigError(what, "Keep the checkpoint's layout")
    return [name for name in names if not is_added_bias(name)]


def _no_counterpart(name: str, layout: str) -> ConfigError:
    return ConfigError(f"{name} has no counterpart in the layout of {layout}", "Keep the checkpoint's layout")


def _check_divisible(source: TensorSource, name: str, hidden: int) -> None:
    """Check that a tensor of ``c_attn`` has 3H outputs, in words that do not cross the thirds."""
    size, part = _output_size(source, name), name.rpartition(".")[2]
    if size % 3 or (part not in _PACKED_WORDS and size != 3 * hidden):
        what = f"{name} has shape {source.shape(name)}; expected 3 x hidden_size ({hidden}) outputs"
        raise ConfigError(what, _COPY_AGAIN)


def _check_joinable(source: TensorSource, names: list[str], hidden: int) -> None:
    """Check that the tensors of q, k and v exist, have H outputs each and group the inputs equally."""
    if missing := next((name for name in names if name not in source), None):
        raise ConfigError(f"{missing} is missing", _COPY_AGAIN)
    part = names[0].rpartition(".")[2]
    for name in names:
        if source.shape(name) != source.shape(names[0]) or (
            part not in (*_PACKED_WORDS, "g_idx") and _output_size(source, name) != hidden
        ):
            what = f"{name} has shape {source.shape(name)}; expected hidden_size ({hidden}) outputs"
            fix = "Qwen v1's layout has as many key-value heads as heads: keep the checkpoint's layout"
            raise ConfigError(what, fix)
    if part == "g_idx":
        first = source.read(names[0])
        if different := next((name for name in names if not torch.equal(source.read(name), first)), None):
            what = f"{different} groups the inputs in another order than {names[0]} (act-order)"
            fix = "One layer has one order: keep the checkpoint's layout, or give --dtype to dequantise it"
            raise ConfigError(what, fix)
