"""Unpacking GPTQ and AWQ weights, compared with weights that are packed here value by value."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints.model_config import Quantization
from checkpoints.packed_weights import unpack_weight

I, O = 48, 32  # noqa: E741 - inputs and outputs, as in the module under test
AWQ_SLOTS = [0, 2, 4, 6, 1, 3, 5, 7]


def words(rows: list[list[int]], bits: int, columns: list[int]) -> Tensor:
    """Pack each row into 32-bit words; ``columns[k]``: the column in slot k of a word."""
    per_word, packed = 32 // bits, []
    for row in rows:
        line = []
        for start in range(0, len(row), per_word):
            word = sum(row[start + column] << (bits * slot) for slot, column in enumerate(columns))
            line.append(word - (1 << 32) if word >= 1 << 31 else word)
        packed.append(line)
    return torch.tensor(packed, dtype=torch.int32)


def transposed(rows: list[list[int]]) -> list[list[int]]:
    return [list(row) for row in zip(*rows, strict=True)]


class Layer:
    """Random values, zero points and scales, and their weights [O, I]."""

    def __init__(self, bits: int, groups: list[int], seed: int = 0) -> None:
        draw = random.Random(seed)
        self.bits, self.groups, top = bits, groups, (1 << bits) - 1
        self.values = [[draw.randint(0, top) for _ in range(O)] for _ in range(I)]
        self.zeros = [[draw.randint(0, top) for _ in range(O)] for _ in range(max(groups) + 1)]
        self.scales = torch.rand(max(groups) + 1, O).half()
        scales = self.scales.double().tolist()
        self.weight = torch.tensor(
            [[scales[g][o] * (self.values[i][o] - self.zeros[g][o]) for i, g in enumerate(groups)] for o in range(O)],
            dtype=torch.float64,
        )

    def gptq(self, zero_offset: int) -> dict[str, Any]:
        in_order, top = list(range(32 // self.bits)), (1 << self.bits) - 1
        stored = [[(zero - zero_offset) & top for zero in row] for row in self.zeros]
        return {
            "qweight": words(transposed(self.values), self.bits, in_order).T.contiguous(),
            "qzeros": words(stored, self.bits, in_order),
            "scales": self.scales,
            "g_idx": torch.tensor(self.groups, dtype=torch.int32),
        }

    def awq(self) -> dict[str, Any]:
        return {
            "qweight": words(self.values, self.bits, AWQ_SLOTS),
            "qzeros": words(self.zeros, self.bits, AWQ_SLOTS),
            "scales": self.scales,
        }


IN_ORDER = [i // 16 for i in range(I)]


@pytest.mark.parametrize("zero_offset", [0, 1])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq(bits: int, zero_offset: int) -> None:
    layer, quantization = Layer(bits, IN_ORDER), Quantization("gptq", bits, 16, zero_offset)
    parts = layer.gptq(zero_offset)
    assert torch.equal(unpack_weight(parts, quantization).double(), layer.weight)
    del parts["g_idx"]
    assert torch.equal(unpack_weight(parts, quantization).double(), layer.weight)


def test_gptq_with_act_order() -> None:
    groups = list(IN_ORDER)
    random.Random(1).shuffle(groups)
    layer = Layer(4, groups)
    assert torch.equal(unpack_weight(layer.gptq(1), Quantization("gptq", 4, 16, 1)).double(), layer.weight)


def test_one_group_per_row() -> None:
    layer = Layer(4, [0] * I)
    assert torch.equal(unpack_weight(layer.awq(), Quantization("awq", 4, -1)).double(), layer.weight)
    parts = layer.gptq(1)
    del parts["g_idx"]
    assert torch.equal(unpack_weight(parts, Quantization("gptq", 4, -1, 1)).double(), layer.weight)


def test_awq() -> None:
    layer = Layer(4, IN_ORDER)
    assert torch.equal(unpack_weight(layer.awq(), Quantization("awq", 4, 16)).double(), layer.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_weights_are_rounded_once(dtype: torch.dtype) -> None:
    layer = Layer(4, IN_ORDER)
    for parts, quantization in (
        (layer.gptq(1), Quantization("gptq", 4, 16, 1)),
        (layer.awq(), Quantization("awq", 4, 16)),
    ):
        weight = unpack_weight(parts, quantization, dtype)
        assert weight.dtype == dtype and torch.equal(weight, layer.weight.to(dtype))
