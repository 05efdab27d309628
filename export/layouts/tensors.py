"""Qwen v1's weights under Qwen2's names and back, tensor by tensor: every value stays as it is.

Qwen v1 computes what Qwen2 with as many key-value heads as heads computes, up to the length it was trained with. So a
checkpoint in Qwen2's layout opens wherever Qwen2 does, without any code of ours. Packed layers (GPTQ, AWQ) are divided
and joined by their columns, which are the outputs.

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

# Along which axis a tensor of a layer holds the layer's outputs; ``g_idx`` knows inputs only.
_OUTPUTS = {"weight": 0, "bias": 0, "qweight": 1, "qzeros": 1, "scales": 1, "g_idx": None}
_IN_WORDS = ("qweight", "qzeros")  # a word may hold several outputs
# Tables in old files, which every model computes.
_COMPUTED = re.compile(r".*\.(rotary_emb\.inv_freq|attn\.(bias|masked_bias))")
_COPY_AGAIN = "Copy config.json and all weight files again from the original checkpoint"


@dataclass(frozen=True)
class _Slice:
    """``start`` to ``stop`` of a tensor, along the axis of its outputs."""

    name: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class _ConvertedTensors(View):
    """Tensors that are pieces of those below, side by side; what has no axis of outputs is taken from the first."""

    def __init__(self, below: TensorSource, pieces: Mapping[str, list[_Slice]]) -> None:
        super().__init__(below)
        self._pieces = pieces

    def names(self) -> list[str]:
        return list(self._pieces)

    def __contains__(self, name: str) -> bool:
        return name in self._pieces

    def shape(self, name: str) -> tuple[int, ...]:
        pieces, axis = self._pieces[name], _axis(name)
        shape = list(self.below.shape(pieces[0].name))
        if axis is not None:
            shape[axis] = sum(map(len, pieces))
        return tuple(shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.below.dtype(self._pieces[name][0].name)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        pieces, axis = self._pieces[name], _axis(name)
        if axis is None:
            return self.below.rows(pieces[0].name, start, stop)
        if axis == 1:
            parts = [self.below.rows(piece.name, start, stop)[:, piece.start : piece.stop] for piece in pieces]
        else:
            parts = [*self._outputs(pieces, *slice(start, stop).indices(self.shape(name)[0])[:2])]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis)

    def _outputs(self, pieces: list[_Slice], start: int, stop: int) -> Iterator[Tensor]:
        """Rows ``start`` to ``stop`` of the pieces, counted through all of them."""
        first = 0
        for piece in pieces:
            begin, end = max(start - first, 0), min(stop - first, len(piece))
            if begin < end:
                yield self.below.rows(piece.name, piece.start + begin, piece.start + end)
            first += len(piece)


def tensors_to_qwen2(source: TensorSource, config: Mapping[str, Any]) -> TensorSource:
    """The tensors of a Qwen v1 checkpoint under Qwen2's names.

    Args:
        config: the checkpoint's config.json.

    Raises:
        ConfigError: tensors that Qwen2 has no place for, or that do not belong to the config; weights that bitsandbytes
            packed, whose blocks do not end where rows do.
    """
    hidden = _hidden_size(config)
    pieces: dict[str, list[_Slice]] = {}
    for name in _relevant(source, "c_attn"):
        module, _, part = name.rpartition(".")
        later = modules_in_qwen2(module)
        if not later or part not in _OUTPUTS:
            raise _no_place(name, "Qwen2")
        size, axis = _outputs_of(source, name), _OUTPUTS[part]
        if len(later) == 3 and axis is not None:
            _check_divisible(source, name, hidden)
        third = size // len(later)
        for index, new in enumerate(later):
            pieces[f"{new}.{part}"] = [_Slice(name, index * third, (index + 1) * third)]
    return _ConvertedTensors(source, pieces)


def tensors_to_qwen(source: TensorSource, config: Mapping[str, Any]) -> TensorSource:
    """The tensors of a Qwen2 checkpoint of Qwen v1's shape under Qwen v1's names.

    Args:
        config: the checkpoint's config.json.

    Raises:
        ConfigError: tensors that Qwen v1 has no place for, or that do not belong to the config; q, k and v that cannot
            be one layer.
    """
    hidden = _hidden_size(config)
    pieces: dict[str, list[_Slice]] = {}
    for name in _relevant(source, "q_proj", "k_proj", "v_proj"):
        module, _, part = name.rpartition(".")
        earlier = module_in_qwen(module)
        if earlier is None or part not in _OUTPUTS:
            raise _no_place(name, "Qwen v1")
        new, third = earlier
        if third is None:
            pieces[f"{new}.{part}"] = [_Slice(name, 0, _outputs_of(source, name))]
        elif f"{new}.{part}" not in pieces:
            parts = [f"{module[: -len('q_proj')]}{letter}_proj.{part}" for letter in "qkv"]
            _check_joinable(source, parts, hidden)
            pieces[f"{new}.{part}"] = [_Slice(each, 0, _outputs_of(source, each)) for each in parts]
    return _ConvertedTensors(source, pieces)


def _axis(name: str) -> int | None:
    return _OUTPUTS[name.rpartition(".")[2]]


def _outputs_of(source: TensorSource, name: str) -> int:
    """The length of a tensor's axis of outputs, in words where they are packed; 0 where there is none."""
    axis = _axis(name)
    return 0 if axis is None else source.shape(name)[axis]


def _hidden_size(config: Mapping[str, Any]) -> int:
    size = config.get("hidden_size", config.get("n_embd"))
    if not isinstance(size, int):
        raise ConfigError(f"config.json: hidden_size is {size!r}", _COPY_AGAIN)
    return size


def _relevant(source: TensorSource, *biased: str) -> list[str]:
    """The tensors that a layout has to have a place for: all but computed tables and the zeros of added biases."""
    names = [name for name in source.names() if not _COMPUTED.fullmatch(name)]
    if strange := next((name for name in names if re.search(r"\.(SCB|weight_format|weight\..+)$", name)), None):
        raise ConfigError(
            f"{strange}: weights that bitsandbytes has packed cannot be given other names",
            "Convert the unquantised checkpoint, or give --dtype to dequantise this one",
        )

    def is_added_bias(name: str) -> bool:
        # auto-gptq wrote one, of zeros, for every layer that it quantised.
        module, _, part = name.rpartition(".")
        return part == "bias" and not module.endswith(biased)

    for name in filter(is_added_bias, names):
        if source.read(name).any():
            raise ConfigError(f"{name}: the layer has a bias, which its counterpart has not", "Keep the layout it has")
    return [name for name in names if not is_added_bias(name)]


def _no_place(name: str, layout: str) -> ConfigError:
    return ConfigError(f"{name} has no place in the layout of {layout}", "Keep the layout it has")


def _check_divisible(source: TensorSource, name: str, hidden: int) -> None:
    """``c_attn`` has three times as many outputs as the config says, and a third of them ends where a word does."""
    size, part = _outputs_of(source, name), name.rpartition(".")[2]
    if size % 3 or (part not in _IN_WORDS and size != 3 * hidden):
        shape = source.shape(name)
        raise ConfigError(f"{name} has the shape {shape}, which is no three times hidden_size {hidden}", _COPY_AGAIN)


def _check_joinable(source: TensorSource, names: list[str], hidden: int) -> None:
    """Tensors of q, k and v are there, as large as the config says, and group inputs alike."""
    if missing := next((name for name in names if name not in source), None):
        raise ConfigError(f"{missing} is missing", _COPY_AGAIN)
    part = names[0].rpartition(".")[2]
    for name in names:
        if source.shape(name) != source.shape(names[0]) or (
            part not in (*_IN_WORDS, "g_idx") and _outputs_of(source, name) != hidden
        ):
            what = f"{name} has the shape {source.shape(name)}, where hidden_size is {hidden}"
            raise ConfigError(what, "Qwen v1's layout has as many key-value heads as heads: keep the layout it has")
    if part == "g_idx":
        first = source.read(names[0])
        if strange := next((name for name in names if not torch.equal(source.read(name), first)), None):
            what = f"{strange} groups the inputs in another order than {names[0]} (act-order)"
            raise ConfigError(what, "One layer has one order: keep the layout it has, or give --dtype to dequantise it")
