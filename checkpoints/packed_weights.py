"""Quantised weights as floating-point matrices: GPTQ's and AWQ's packed integers, and what bitsandbytes saves.

A word of 32 bits holds P = 32 / bits values. I inputs, O outputs, G groups of inputs that share scale and zero point:
a weight is ``scale * (value - zero)``.

GPTQ (Frantar et al. 2022) in auto-gptq's layout:
    qweight [I / P, O], packed along the inputs; qzeros [G, O / P], packed along the outputs, each less one in the first
    format; scales [G, O]; g_idx [I], the group of each input, which need not be sorted (act-order).
AWQ (Lin et al. 2023) in AutoAWQ's GEMM layout:
    qweight [I, O / P] and qzeros [G, O / P], packed along the outputs in the order 0 2 4 6 1 3 5 7; scales [G, O].
NF4 and FP4 (Dettmers et al. 2023) as bitsandbytes saves them:
    two values a byte, the first in its upper half, in one long row; each is a place in quant_map [16]; absmax, a scale
    per block of them, may itself be quantised: to places in nested_quant_map [256], with scales and an offset.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from checkpoints.model_config import Quantization

PARTS = ("qweight", "qzeros", "scales", "g_idx")
"""Tensors of a packed layer; ``g_idx`` may be absent."""

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column, of eight, that stands at each place of a word of AWQ's."""

# Weights that are unpacked at a time: on a CPU as many as its caches hold, on a GPU enough to keep it busy.
_AT_A_TIME = {"cpu": 1 << 18}
_ELSEWHERE = 1 << 25


def unpack_weight(
    parts: Mapping[str, Tensor], quantization: Quantization, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The weight [O, I] of a packed layer; the products are exact in float32 and rounded once to ``dtype``.

    Args:
        parts: the layer's tensors by the last part of their names. Without ``g_idx``, or with an empty one, groups are
            runs of inputs.
    """
    qweight, scales, is_awq = parts["qweight"], parts["scales"].float(), quantization.method == "awq"
    per_word = 32 // quantization.bits
    outputs, inputs = weight_shape(qweight.shape, quantization)
    shifts = _shifts(quantization).to(qweight.device)
    zeros = (_unpack(parts["qzeros"], shifts, quantization.bits) + quantization.zero_offset) & _largest(quantization)
    offsets = scales * zeros  # a zero point of 0, less one, is stored as the largest value, and comes back to 0
    size, groups = quantization.inputs_per_group(inputs), parts.get("g_idx")
    if groups is not None and groups.numel() == 0:
        groups = None
    if groups is None and inputs % size:
        groups = torch.arange(inputs, device=qweight.device) // size
    run = size if groups is None else per_word
    step = run * max(1, _AT_A_TIME.get(qweight.device.type, _ELSEWHERE) // (run * outputs))
    weight = torch.empty(inputs, outputs, dtype=dtype, device=qweight.device)
    for start in range(0, inputs, step):
        end = min(start + step, inputs)
        if is_awq:
            values = _unpack(qweight[start:end], shifts, quantization.bits)
        else:
            words = qweight[start // per_word : end // per_word, None]
            values = ((words >> shifts[:, None]) & _largest(quantization)).flatten(0, 1)
        if groups is None:
            of_runs = slice(start // size, end // size)
            block = values.view(-1, size, outputs) * scales[of_runs, None] - offsets[of_runs, None]
        else:
            of_inputs = groups[start:end].long()
            block = values * scales[of_inputs] - offsets[of_inputs]
        weight[start:end] = block.view(-1, outputs)
    return weight.T


def weight_shape(qweight: Sequence[int], quantization: Quantization) -> tuple[int, int]:
    """O and I of the weight that a ``qweight`` of this shape holds."""
    rows, columns, per_word = *qweight, 32 // quantization.bits
    return (columns * per_word, rows) if quantization.method == "awq" else (columns, rows * per_word)


def is_in_order(groups: Tensor, quantization: Quantization) -> bool:
    """Whether a ``g_idx`` says nothing more than that groups are runs of inputs."""
    runs = torch.arange(len(groups), device=groups.device) // quantization.inputs_per_group(max(1, len(groups)))
    return torch.equal(groups.to(runs.dtype), runs)


def _shifts(quantization: Quantization) -> Tensor:
    """[P]: by how many bits each of a word's values is shifted, in the order of inputs or outputs."""
    order = AWQ_ORDER if quantization.method == "awq" else range(32 // quantization.bits)
    places = sorted(range(len(order)), key=lambda place: order[place])
    return torch.tensor([quantization.bits * place for place in places], dtype=torch.int32)


def _unpack(words: Tensor, shifts: Tensor, bits: int) -> Tensor:
    """[R, O / P] -> [R, O], of words that are packed along the outputs."""
    return ((words[:, :, None] >> shifts) & ((1 << bits) - 1)).flatten(1)


def _largest(quantization: Quantization) -> int:
    return (1 << quantization.bits) - 1


def dequantize_4bit(parts: Mapping[str, Tensor], state: Mapping[str, Any]) -> Tensor:
    """The weight [O, I] in float32 of a layer that bitsandbytes has quantised to NF4 or FP4.

    Args:
        parts: the tensors by what follows ``.weight`` in their names; the packed values by an empty string.
        state: the JSON that is saved beside them.
    """
    scales = parts[".absmax"]
    if ".nested_absmax" in parts:
        blocks = parts[".nested_absmax"].repeat_interleave(state["nested_blocksize"])[: scales.numel()]
        scales = parts[".nested_quant_map"][scales.int()] * blocks + state["nested_offset"]
    packed = parts[""].flatten()
    values = torch.empty(2 * packed.numel(), dtype=torch.uint8)
    values[0::2], values[1::2] = packed >> 4, packed & 15
    weight = parts[".quant_map"].float()[values.int()]
    whole = len(scales) * state["blocksize"]
    if len(weight) < whole:  # the last block need not be full
        weight = torch.nn.functional.pad(weight, (0, whole - len(weight)))
    weight = weight.view(-1, state["blocksize"]).mul_(scales[:, None]).flatten()
    shape = tuple(state["shape"])
    return weight[: shape[0] * shape[1]].view(shape)


def dequantize_8bit(values: Tensor, scales: Tensor) -> Tensor:
    """The weight [O, I] in float32 of a layer that bitsandbytes has quantised to 8 bits: 127 is ``scales`` [O]."""
    return values.float() * (scales.float() / 127)[:, None]


class IntegerWeight(NamedTuple):
    """A weight [O, I] as integers: ``scales * (values - zeros)``, with G groups of inputs.

    Attributes:
        values: int32 [O, I].
        scales: float16 [O, G].
        zeros: int32 [O, G].
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor


def pack_weight(rounded: IntegerWeight, quantization: Quantization) -> dict[str, Tensor]:
    """The tensors of a layer by the last part of their names, on the CPU."""
    bits, per_word = quantization.bits, 32 // quantization.bits
    values, scales, zeros = (tensor.T.cpu() for tensor in rounded)
    if quantization.method == "awq":
        qweight, qzeros = (_pack_columns(each, bits, AWQ_ORDER) for each in (values, zeros))
        return {"qweight": qweight, "qzeros": qzeros, "scales": scales.contiguous()}
    qweight = torch.zeros(values.shape[0] // per_word, values.shape[1], dtype=torch.int32)
    for place in range(per_word):
        qweight |= values[place::per_word] << (bits * place)
    zeros = (zeros - quantization.zero_offset) & ((1 << bits) - 1)
    return {
        "qweight": qweight,
        "qzeros": _pack_columns(zeros, bits, tuple(range(per_word))),
        "scales": scales.contiguous(),
        "g_idx": torch.arange(len(values), dtype=torch.int32) // quantization.group_size,
    }


def _pack_columns(values: Tensor, bits: int, order: tuple[int, ...]) -> Tensor:
    """[G, O] -> [G, O / P]: place k of a word takes its column ``order[k]``."""
    packed = torch.zeros(values.shape[0], values.shape[1] // len(order), dtype=torch.int32)
    for place, column in enumerate(order):
        packed |= values[:, column :: len(order)] << (bits * place)
    return packed
