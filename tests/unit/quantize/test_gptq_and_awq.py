"""GPTQ and AWQ of one weight: packing round-trips, and the layer's outputs change less than with plain rounding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from checkpoints.model_config import Quantization
from checkpoints.packed_weights import IntegerWeight, pack_weight, unpack_weight
from errors import RunError
from quantize.awq import quantize_awq, search_scales
from quantize.gptq import quantize_gptq

OUTPUTS, INPUTS, GROUP = 48, 128, 32


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


def round_to_nearest(weight: Tensor, bits: int) -> Tensor:
    """Round symmetrically with a scale per group that covers the largest weight."""
    groups, middle = weight.view(OUTPUTS, -1, GROUP), 1 << (bits - 1)
    scales = groups.abs().amax(-1, keepdim=True) / (middle - 0.5)
    return ((groups / scales).round().clamp(-middle, middle - 1) * scales).view_as(weight)


def output_error(weight: Tensor, quantised: Tensor, inputs: Tensor) -> float:
    """Mean square of the change of the outputs relative to that of the outputs."""
    return float(((quantised - weight) @ inputs.T).square().mean() / (weight @ inputs.T).square().mean())


def by_gptq(weight: Tensor, inputs: Tensor, bits: int = 4) -> Tensor:
    return dequantised(quantize_gptq(weight, gram_of(inputs), bits, GROUP))


def by_awq(weight: Tensor, inputs: Tensor) -> Tensor:
    """Quantise with input scales that the preceding layer would absorb."""
    scales = search_scales([weight], gram_of(inputs), inputs.abs().mean(0), GROUP)
    return dequantised(quantize_awq(weight * scales, gram_of(inputs / scales), GROUP)) / scales


@pytest.mark.parametrize(("bits", "share"), [(4, 0.35), (8, 0.6)])
def test_gptq_changes_the_outputs_less_than_rounding(weight: Tensor, inputs: Tensor, bits: int, share: float) -> None:
    plain = output_error(weight, round_to_nearest(weight, bits), inputs)
    assert output_error(weight, by_gptq(weight, inputs, bits), inputs) < share * plain


def test_gptq_uses_the_inputs(weight: Tensor, inputs: Tensor) -> None:
    """A weight calibrated for uncorrelated inputs of equal size has a larger error on the real ones."""
    fitted = output_error(weight, by_gptq(weight, inputs), inputs)
    assert fitted < 0.7 * output_error(weight, dequantised(quantize_gptq(weight, torch.eye(INPUTS), 4, GROUP)), inputs)


def test_awq_changes_the_outputs_less_than_rounding(weight: Tensor, inputs: Tensor) -> None:
    plain = output_error(weight, round_to_nearest(weight, 4), inputs)
    assert output_error(weight, by_awq(weight, inputs), inputs) < 0.6 * plain


def test_awq_uses_scales_and_ranges(weight: Tensor, inputs: Tensor) -> None:
    gram = gram_of(inputs)
    unscaled = output_error(weight, dequantised(quantize_awq(weight, gram, GROUP)), inputs)
    assert output_error(weight, by_awq(weight, inputs), inputs) < 0.8 * unscaled
    without_inputs = dequantised(quantize_awq(weight, torch.eye(INPUTS), GROUP))
    assert unscaled < output_error(weight, without_inputs, inputs)


def test_arguments_are_not_modified(weight: Tensor, inputs: Tensor) -> None:
    before, gram = weight.clone(), gram_of(inputs)
    gram_before = gram.clone()
    quantize_gptq(weight, gram, 4, GROUP)
    quantize_awq(weight, gram, GROUP)
    assert torch.equal(weight, before) and torch.equal(gram, gram_before)


@pytest.mark.parametrize(("method", "bits"), [("gptq", 4), ("gptq", 8), ("awq", 4)])
def test_packed_weight_round_trips(weight: Tensor, inputs: Tensor, method: str, bits: int) -> None:
    gram = gram_of(inputs)
    rounded = quantize_gptq(weight, gram, bits, GROUP) if method == "gptq" else quantize_awq(weight, gram, GROUP)
    assert int(rounded.values.min()) >= 0 and int(rounded.values.max()) < 1 << bits
    assert len(rounded.values.unique()) > (1 << bits) / 2, "most values occur"
    quantization = Quantization("awq" if method == "awq" else "gptq", bits, GROUP, zero_offset=int(method == "gptq"))
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


METHODS: list[Callable[[Tensor, Tensor], Tensor]] = [by_gptq, by_awq]


@pytest.mark.parametrize("quantise", METHODS)
def test_input_channels_of_zeros(weight: Tensor, inputs: Tensor, quantise: Callable[..., Tensor]) -> None:
    inputs[:, 5:40] = 0
    assert output_error(weight, quantise(weight, inputs), inputs) < 0.02


@pytest.mark.parametrize("quantise", METHODS)
def test_fewer_samples_than_inputs(weight: Tensor, inputs: Tensor, quantise: Callable[..., Tensor]) -> None:
    assert output_error(weight, quantise(weight, inputs[:10]), inputs) < 0.02


@pytest.mark.parametrize("quantise", METHODS)
def test_constant_rows(weight: Tensor, inputs: Tensor, quantise: Callable[..., Tensor]) -> None:
    weight[0] = 0
    weight[1] = 0.25
    weight[2] = -0.25
    quantised = quantise(weight, inputs)
    assert quantised[0].count_nonzero() == 0
    for row in (1, 2):
        assert output_error(weight[row : row + 1], quantised[row : row + 1], inputs) < 0.02


def test_nan_in_the_inputs_is_refused(weight: Tensor, inputs: Tensor) -> None:
    inputs[3, 7] = torch.nan
    with pytest.raises(RunError, match="not finite"):
        quantize_gptq(weight, gram_of(inputs), 4, GROUP)
