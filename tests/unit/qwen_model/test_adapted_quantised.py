"""Projections of quantised layers: results of calling them, without keeping what they dequantise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from loading.quantized import patch_bitsandbytes_linear
from qwen_model.adapted_linear import project, project_gated
from qwen_model.adapter_dropout import use_adapter_dropout
from tests.unit.loading.test_quantized import INPUTS, make_layer


def packed(with_bias: bool) -> nn.Module:
    return make_layer(outputs=24 - 3 * with_bias, with_bias=with_bias)  # with a bias that is padded


def four_bits(with_bias: bool) -> nn.Module:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(INPUTS, 24, bias=with_bias, compute_dtype=torch.float32, quant_type="nf4")
    return layer.requires_grad_(False).to("cpu")


def eight_bits(with_bias: bool) -> nn.Module:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear8bitLt(INPUTS, 24, bias=with_bias, has_fp16_weights=False)
    return layer.requires_grad_(False).to("cpu")


def build(make: Any) -> Any:
    torch.manual_seed(0)
    layers = nn.ModuleDict({"first": make(True), "second": make(False)})
    patch_bitsandbytes_linear(layers, torch.float32)
    config = LoraConfig(r=4, lora_dropout=0.3, target_modules=["first", "second"], init_lora_weights=False)
    model: Any = get_peft_model(layers, config)  # type: ignore[arg-type]
    use_adapter_dropout(model.modules())
    return model.train()


def results(model: Any, is_fused: bool, autocast: bool) -> list[Tensor]:
    layers = model.base_model.model
    torch.manual_seed(1)
    hidden, gate, up = (torch.randn(3, INPUTS, requires_grad=True) for _ in range(3))
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if is_fused:
            outputs = [*project(hidden, [layers.first, layers.second]), project_gated(gate, up, layers.first)]
        else:
            state = torch.get_rng_state()
            outputs = [layers.first(hidden)]
            torch.set_rng_state(state)  # layers with a common input share its dropout
            outputs += [layers.second(hidden), layers.first(F.silu(gate) * up)]
    torch.cat(outputs, -1).float().sin().sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [*outputs, *(tensor.grad for tensor in (hidden, gate, up, *trained))]  # type: ignore[list-item]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("make", [packed, four_bits])
def test_results_are_those_of_the_layers(make: Any, autocast: bool) -> None:
    model = build(make)
    ours, theirs = results(model, True, autocast), results(model, False, autocast)
    assert all(type(output.grad_fn).__name__ == "_ProjectionBackward" for output in ours[:3])
    for tensor, expected in zip(ours, theirs, strict=True):
        assert (tensor - expected).norm() <= (2e-2 if autocast else 1e-6) * expected.norm()


@pytest.mark.parametrize("make", [packed, four_bits])
def test_no_dequantised_weight_is_kept(make: Any) -> None:
    layers, sizes = build(make).base_model.model, []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        output = project(torch.randn(3, INPUTS, requires_grad=True), [layers.first, layers.second])
    assert output and max(sizes) < 24 * INPUTS / 2


def test_layers_of_8_bits_are_called() -> None:
    model = build(eight_bits)
    with torch.no_grad():
        (output,) = project(torch.randn(3, INPUTS), [model.base_model.model.first])
    assert output.shape == (3, 24)
    parts = model.base_model.model.first
    (output,) = project(torch.randn(3, INPUTS), [parts])
    assert type(output.grad_fn).__name__ != "_ProjectionBackward"
