"""GPTQ of one weight, for both file formats: packing round-trips, and outputs change less than with plain rounding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from checkpoints.model_config import Method, Quantization
from checkpoints.packed_weights import IntegerWeight, pack_weight, unpack_weight
from errors import RunError
from quantize import gptq
from quantize.blocks import token_weights
from quantize.gptq import quantize_gptq
from quantize.rounding import round_to_nearest

OUTPUTS, INPUTS, GROUP = 48, 128, 32
METHODS: tuple[Method, ...] = ("gptq", "awq")


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(1)) * 0.05


@pytest.fixture
def inputs() -> Tensor:
    """[600, I]: correlated, some channels much larger than others, as in real models."""
    generator = torch.Generator().manual_seed(2)
    mixing = torch.randn(INPUTS, INPUTS, generator=generator) / INPUTS**0.5 + 0.5 * torch.eye(INPUTS)
    sizes = torch.exp(torch.randn(INPUTS, generator=generator))
    return torch.randn(600, INPUTS, generator=generator) @ mixing * sizes


def gram_of(inputs: Tensor) -> Tensor:
    return inputs.T @ inputs / len(inputs)


def dequantised(rounded: IntegerWeight) -> Tensor:
    zeros, scales = (each.repeat_interleave(GROUP, 1) for each in (rounded.zeros, rounded.scales.float()))
    return (rounded.values - zeros) * scales


def output_error(weight: Tensor, quantised: Tensor, inputs: Tensor) -> float:
    """Mean square of the change of the outputs relative to that of the outputs."""
    return float(((quantised - weight) @ inputs.T).square().mean() / (weight @ inputs.T).square().mean())


def settings(method: Method = "gptq", bits: int = 4) -> Quantization:
    return Quantization(method, bits, GROUP, zero_offset=int(method == "gptq"))


def by_gptq(weight: Tensor, inputs: Tensor, method: Method = "gptq", bits: int = 4) -> Tensor:
    return dequantised(quantize_gptq(weight, gram_of(inputs), len(inputs), settings(method, bits)))


@pytest.mark.parametrize(("bits", "share"), [(4, 0.35), (8, 0.6)])
def test_outputs_change_less_than_with_rounding_to_nearest(
    weight: Tensor, inputs: Tensor, bits: int, share: float
) -> None:
    plain = output_error(weight, round_to_nearest(weight, bits, GROUP), inputs)
    assert output_error(weight, by_gptq(weight, inputs, bits=bits), inputs) < share * plain


def test_inputs_are_used(weight: Tensor, inputs: Tensor) -> None:
    """A weight calibrated for uncorrelated inputs of equal size has a larger error on the real ones."""
    fitted = output_error(weight, by_gptq(weight, inputs), inputs)
    without = dequantised(quantize_gptq(weight, torch.eye(INPUTS), len(inputs), settings()))
    assert fitted < 0.7 * output_error(weight, without, inputs)


def test_few_tokens_are_trusted_less(weight: Tensor, inputs: Tensor) -> None:
    """Chance correlations between the inputs of a few tokens are no reason to compensate one error by another."""
    few, others = inputs[:64], inputs[300:]
    damped = output_error(weight, by_gptq(weight, few), others)
    trusted = dequantised(quantize_gptq(weight, gram_of(few), 10**9, settings()))
    assert damped < 0.8 * output_error(weight, trusted, others)


def test_descent_lowers_the_error(weight: Tensor, inputs: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    with_descent = output_error(weight, by_gptq(weight, inputs), inputs)
    monkeypatch.setattr(gptq, "descend", lambda *_: None)
    assert with_descent < 0.95 * output_error(weight, by_gptq(weight, inputs), inputs)


def test_neither_a_massive_token_nor_the_others_are_sacrificed(weight: Tensor, inputs: Tensor) -> None:
    inputs[0] *= 300
    weighted = inputs * token_weights(inputs).sqrt()[:, None]
    quantised = dequantised(quantize_gptq(weight, gram_of(weighted), len(inputs), settings()))
    nearest = round_to_nearest(weight, 4, GROUP)
    for tokens, share in ((inputs[:1], 0.1), (inputs[1:], 0.5)):
        assert output_error(weight, quantised, tokens) < share * output_error(weight, nearest, tokens)


@pytest.mark.parametrize("method", METHODS)
def test_zero_points_can_be_stored(weight: Tensor, inputs: Tensor, method: Method) -> None:
    """GPTQ stores them minus one: in programs that add the one to words, 0 would change the zero point beside it."""
    weight[0] = weight[0].abs()  # its best zero point is 0
    weight[1] = -weight[1].abs()  # its best zero point is 15
    zeros = quantize_gptq(weight, gram_of(inputs), len(inputs), settings(method)).zeros
    assert int(zeros.min()) == (1 if method == "gptq" else 0) and int(zeros.max()) == 15
    assert len(zeros.unique()) > 4, "groups differ"
    quantised = by_gptq(weight, inputs, method)
    for row in range(3):
        assert output_error(weight[row : row + 1], quantised[row : row + 1], inputs) < 0.02


@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_weights_have_one_zero_point(weight: Tensor, inputs: Tensor, bits: int) -> None:
    quantization = replace(settings(bits=bits), symmetric=bits == 4)  # 8 bits always are
    rounded = quantize_gptq(weight, gram_of(inputs), len(inputs), quantization)
    assert rounded.zeros.unique().tolist() == [1 << bits - 1]
    unpacked = unpack_weight(pack_weight(rounded, quantization), quantization)
    assert output_error(weight, unpacked, inputs) < output_error(weight, round_to_nearest(weight, bits, GROUP), inputs)


def test_arguments_are_not_modified(weight: Tensor, inputs: Tensor) -> None:
    before, gram = weight.clone(), gram_of(inputs)
    gram_before = gram.clone()
    quantize_gptq(weight, gram, len(inputs), settings())
    assert torch.equal(weight, before) and torch.equal(gram, gram_before)


@pytest.mark.parametrize(("method", "bits"), [("gptq", 4), ("gptq", 8), ("awq", 4)])
def test_packed_weight_round_trips(weight: Tensor, inputs: Tensor, method: Method, bits: int) -> None:
    quantization = settings(method, bits)
    rounded = quantize_gptq(weight, gram_of(inputs), len(inputs), quantization)
    assert int(rounded.values.min()) >= 0 and int(rounded.values.max()) < 1 << bits
    assert len(rounded.values.unique()) > (1 << bits) / 2, "most values occur"
    parts = pack_weight(rounded, quantization)
    torch.testing.assert_close(unpack_weight(parts, quantization), dequantised(rounded), rtol=1e-6, atol=1e-7)
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in parts.items()}
    per_word = 32 // bits
    expected = {
        "qweight": ((INPUTS // per_word, OUTPUTS), torch.int32),
        "qzeros": ((INPUTS // GROUP, OUTPUTS // per_word), torch.int32),
        "scales": ((INPUTS // GROUP, OUTPUTS), torch.float16),
        "g_idx": ((INPUTS,), torch.int32),
    }
    if method == "awq":
        expected["qweight"] = ((INPUTS, OUTPUTS // per_word), torch.int32)
        del expected["g_idx"]
    assert shapes == expected


def test_packed_words_of_a_small_weight() -> None:
    """GPTQ: the first of eight inputs is in the lowest bits, the zero point is stored minus one."""
    rounded = IntegerWeight(
        values=torch.arange(8, dtype=torch.int32).repeat(8, 1),
        scales=torch.ones(8, 1, dtype=torch.float16),
        zeros=torch.full((8, 1), 8, dtype=torch.int32),
    )
    parts = pack_weight(rounded, Quantization("gptq", 4, 8, zero_offset=1))
    assert parts["qweight"].tolist() == [[0x76543210] * 8]
    assert parts["qzeros"].tolist() == [[0x77777777]]
    columns = IntegerWeight(rounded.values.T.contiguous(), rounded.scales, rounded.zeros)
    parts = pack_weight(columns, Quantization("awq", 4, 8))
    # Outputs 0 to 7 have the values 0 to 7, packed in the order 0 2 4 6 1 3 5 7.
    assert parts["qweight"].tolist() == [[0x75316420]] * 8
    assert [word & 0xFFFFFFFF for word in parts["qzeros"][0].tolist()] == [0x88888888]


@pytest.mark.parametrize("method", METHODS)
def test_input_channels_of_zeros(weight: Tensor, inputs: Tensor, method: Method) -> None:
    inputs[:, 5:40] = 0
    assert output_error(weight, by_gptq(weight, inputs, method), inputs) < 0.02


@pytest.mark.parametrize("method", METHODS)
def test_fewer_samples_than_inputs(weight: Tensor, inputs: Tensor, method: Method) -> None:
    assert output_error(weight, by_gptq(weight, inputs[:10], method), inputs) < 0.02


@pytest.mark.parametrize("method", METHODS)
def test_constant_rows(weight: Tensor, inputs: Tensor, method: Method) -> None:
    weight[0] = 0
    weight[1] = 0.25
    weight[2] = -0.25
    quantised = by_gptq(weight, inputs, method)
    assert quantised[0].count_nonzero() == 0
    for row in (1, 2):
        assert output_error(weight[row : row + 1], quantised[row : row + 1], inputs) < 0.02


def test_nan_in_the_inputs_is_refused(weight: Tensor, inputs: Tensor) -> None:
    inputs[3, 7] = torch.nan
    with pytest.raises(RunError, match="not finite"):
        quantize_gptq(weight, gram_of(inputs), len(inputs), settings())
