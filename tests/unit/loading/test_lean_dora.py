"""DoRA: outputs and gradients are those of peft, without a copy of a weight."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from loading.adapters import EmbeddingsPolicy, LoraSettings, attach_lora
from loading.checkpoint import load_checkpoint, load_model
from loading.lean_dora import LeanDora, use_lean_dora
from tests.models import TINY

IDS = torch.arange(40).reshape(2, 20)


def build(monkeypatch: pytest.MonkeyPatch, is_lean: bool, dtype: torch.dtype = torch.float32) -> Any:
    """Return a model whose DoRA adapters have learnt something."""
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        if not is_lean:
            patch.setattr("loading.adapters.use_lean_dora", lambda *args, **kwargs: None)
        checkpoint = load_checkpoint(str(TINY))
        settings = LoraSettings(rank=4, alpha=8, dropout=0.0, dora=True)
        model = attach_lora(load_model(checkpoint, dtype), checkpoint, settings, EmbeddingsPolicy("none", ""))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    assert any(isinstance(each, LeanDora) for each in variants(model)) is is_lean
    return model


def variants(model: Any) -> list[Any]:
    return [variant for layer in model.modules() for variant in getattr(layer, "lora_variant", {}).values()]


def gradients(model: Any) -> dict[str, Tensor]:
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_outputs_and_gradients_are_those_of_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = build(monkeypatch, True), build(monkeypatch, False)
    for model in (ours.eval(), theirs.eval()):
        model.zero_grad()
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits, rtol=0, atol=1e-4)
    expected = gradients(theirs)
    for name, gradient in gradients(ours).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_under_autocast_outputs_are_those_in_float32_within_what_rounding_explains(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected, half = build(monkeypatch, True), build(monkeypatch, True, torch.bfloat16)
    plain = copy.deepcopy(half)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), plain.disable_adapter():
        rounding = plain(input_ids=IDS).logits.float()
    with torch.no_grad(), expected.disable_adapter():
        rounding -= expected(input_ids=IDS).logits
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        actual = half(input_ids=IDS).logits.float()
    with torch.no_grad():
        error = actual - expected(input_ids=IDS).logits
    assert error.norm() < 3 * rounding.norm()


def test_no_tensor_of_a_step_is_as_large_as_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(monkeypatch, True)
    weights = {layer.get_base_layer().weight.numel() for layer in model.modules() if hasattr(layer, "lora_variant")}
    sizes: set[int] = set()

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = func(*args, **(kwargs or {}))
            if isinstance(output, Tensor) and output.dim() == 2 and func is not torch.ops.aten.t.default:
                sizes.add(output.numel())
            return output

    layer = next(layer for layer in model.modules() if len(getattr(layer, "lora_variant", {})))
    rows = torch.randn(1, 3, layer.in_features)
    with Sizes():
        layer(rows).sum().backward()
    assert max(sizes) < min(weights)
    use_lean_dora(model.modules())  # once more: nothing is left to replace
