"""Rounded weights in the layouts of GPTQ and AWQ checkpoints, which ``checkpoints.dequantize`` describes and reads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from checkpoints.dequantize import AWQ_ORDER
from checkpoints.quantization import Quantization


class Rounded(NamedTuple):
    """A weight [O, I] as integers: ``scales * (values - zeros)``, with G groups of inputs.

    Attributes:
        values: int32 [O, I].
        scales: float16 [O, G].
        zeros: int32 [O, G].
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor


def pack(rounded: Rounded, quantization: Quantization) -> dict[str, Tensor]:
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
