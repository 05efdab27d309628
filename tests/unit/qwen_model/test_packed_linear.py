"""A packed layer computes what its weight of 16 bits does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen_model.packed_linear import Packer

pytestmark = pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines, reason="torch has no FBGEMM for this processor"
)


def packed(weight: Tensor, bias: Tensor | None = None) -> list[nn.Module]:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    made: list[nn.Module] = []
    with torch.inference_mode(), Packer() as packer:
        packer.pack(layer, made.append)
    return made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("outputs", "largest"), [(48, 1.0), (37, 3e-4), (37, 100.0)])
def test_output_is_the_product_rounded_once(dtype: torch.dtype, outputs: int, largest: float) -> None:
    torch.manual_seed(0)
    # Sizes of real weights: most are near the largest, a few many orders below.
    weight = (torch.randn(outputs, 80) * torch.rand(outputs, 80) ** 6 * largest / 4).to(dtype)
    bias = (torch.randn(outputs) * largest).to(dtype)
    [layer] = packed(weight, bias)
    for shape in ((1, 80), (5, 1, 80), (2, 9, 80)):
        states = torch.randn(shape).to(dtype)
        expected = F.linear(states.double(), weight.double(), bias.double())
        got = layer(states)
        assert got.dtype == dtype and got.shape == expected.shape
        # Half a step of the result's own type, and the rounding of sums in float32.
        room = expected.abs() * torch.finfo(dtype).eps / 2 + largest * 1e-5 + torch.finfo(dtype).smallest_normal
        assert ((got.double() - expected).abs() <= room).all()


def test_weights_that_float16_cannot_hold_are_scaled() -> None:
    weight = torch.tensor([[2.0**100, 2.0**75, 0.0], [-(2.0**-3), 0.0, 2.0**90]], dtype=torch.bfloat16)
    [layer] = packed(weight)
    states = torch.eye(3, dtype=torch.bfloat16)
    assert torch.equal(layer(states)[:, 0], weight[0]) and layer(states)[2, 1] == 2.0**90


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_layers_without_a_largest_finite_number_stay_as_they_are(value: float) -> None:
    assert packed(torch.full((2, 4), value, dtype=torch.bfloat16)) == []
