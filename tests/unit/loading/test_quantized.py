"""Layers over packed integers, and models that compute in float32 with 16-bit weights."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from checkpoints.model_config import Quantization, check_bitsandbytes
from console import pip_command
from errors import ConfigError
from loading.quantized import QuantizedLinear, compute_in_float32, count_weights

INPUTS, OUTPUTS, GROUP = 32, 24, 16
AWQ = Quantization("awq", 4, GROUP)


def make_layer(inputs: int = INPUTS, outputs: int = OUTPUTS, with_bias: bool = True) -> QuantizedLinear:
    """Build a layer of random bits; stored rows and columns beyond ``inputs`` and ``outputs`` are padding."""
    generator = torch.Generator().manual_seed(0)
    words = {"dtype": torch.int32, "generator": generator}
    parts: dict[str, Tensor] = {
        "qweight": torch.randint(-(2**31), 2**31, (INPUTS, OUTPUTS // 8), **words),  # type: ignore[call-overload]
        "qzeros": torch.randint(-(2**31), 2**31, (INPUTS // GROUP, OUTPUTS // 8), **words),  # type: ignore[call-overload]
        "scales": torch.rand(INPUTS // GROUP, OUTPUTS, generator=generator).half() / 10,
    }
    if with_bias:
        parts["bias"] = torch.rand(OUTPUTS, generator=generator).half()
    layer = QuantizedLinear(
        inputs, outputs, {name: (tuple(part.shape), part.dtype) for name, part in parts.items()}, AWQ
    )
    layer.load_state_dict(parts, assign=True)
    return layer.requires_grad_(False)


def dequantized(layer: QuantizedLinear) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    linear.weight.data = layer.weight
    if layer.bias is not None:
        linear.bias.data = layer.bias[: layer.out_features].float()
    return linear.requires_grad_(False)


@pytest.mark.parametrize(("inputs", "outputs"), [(INPUTS, OUTPUTS), (INPUTS - 5, OUTPUTS - 3)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_output_and_gradient_are_those_of_a_linear_layer(inputs: int, outputs: int, with_bias: bool) -> None:
    layer = make_layer(inputs, outputs, with_bias)
    linear = dequantized(layer)
    assert linear.weight.shape == (outputs, inputs)
    x, y = (torch.randn(3, 7, inputs, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    weights = torch.randn(3, 7, outputs)
    torch.testing.assert_close(layer(x), linear(y))
    (layer(x) * weights).sum().backward()
    (linear(y) * weights).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_backward_pass_saves_no_tensor() -> None:
    layer, saved = make_layer(), []
    x = torch.randn(2, INPUTS, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        layer(x).sum()
        assert sum(saved) == 0
        F.linear(x, layer.weight).sum()
    assert sum(saved) == INPUTS * OUTPUTS


def test_autocast_and_narrow_inputs() -> None:
    layer, x = make_layer(), torch.randn(2, INPUTS)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer(x).dtype == torch.float32
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x.bfloat16()).float(), dequantized(layer)(x), rtol=0.05, atol=0.05)


def test_peft_adapts_it_like_a_linear_layer_without_changing_it() -> None:
    model = nn.ModuleDict({"layer": make_layer()})
    before = copy.deepcopy(model.state_dict())
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["layer"], init_lora_weights=False))  # type: ignore[arg-type]
    lora: Any = model["layer"]
    assert isinstance(lora, peft.tuners.lora.Linear)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == 4 * (INPUTS + OUTPUTS)
    optimizer = torch.optim.SGD(trained, lr=1)
    for _ in range(3):
        lora(torch.randn(5, INPUTS)).sum().backward()
        optimizer.step()
    assert all(
        torch.equal(tensor, lora.base_layer.state_dict()[name.removeprefix("layer.")])
        for name, tensor in before.items()
    )


def test_count_of_packed_weights() -> None:
    model = nn.ModuleDict({"packed": make_layer(), "plain": nn.Linear(3, 5)})
    assert count_weights(model) == INPUTS * OUTPUTS + OUTPUTS + 3 * 5 + 5


def test_16_bit_weights_compute_in_float32() -> None:
    stored = nn.ModuleDict({"embed": nn.Embedding(10, 4), "head": nn.Linear(4, 10)}).half()
    wide = copy.deepcopy(stored).float()
    compute_in_float32(stored)
    ids = torch.tensor([1, 5])
    hidden = stored["embed"](ids)
    assert hidden.dtype == torch.float32
    torch.testing.assert_close(stored["head"](hidden), wide["head"](wide["embed"](ids)))
    assert {parameter.dtype for parameter in stored.parameters()} == {torch.float16}


def test_bitsandbytes_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as error:
        check_bitsandbytes("NF4")
    assert (
        str(error.value)
        == f"NF4 needs bitsandbytes, which is not installed. Install it: {pip_command('requirements_qlora.txt')}"
    )
