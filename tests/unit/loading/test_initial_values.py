"""PiSSA and OLoRA: what peft trains, on a base that stays as it is, saved as a plain LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from errors import ConfigError
from loading.adapters import EmbeddingsPolicy, LoraSettings, attach_lora, load_adapter
from loading.checkpoint import load_checkpoint, load_model
from loading.initial_values import change_of, is_plain
from tests.models import TINY
from training.run_folder.saving import save_adapter

METHODS = ("pissa", "olora")
IDS = torch.arange(40).reshape(2, 20)
PATTERNS: dict[str, Any] = {"rank_pattern": {"w1": 2, "0.attn.c_attn": 6}, "alpha_pattern": {"w2": 3}}


def base() -> Any:
    return load_model(load_checkpoint(str(TINY)), torch.float32)


def build(method: str, **settings: Any) -> Any:
    settings = {"rank": 4, "alpha": 8, "dropout": 0.0, **settings}
    checkpoint = load_checkpoint(str(TINY))
    policy = EmbeddingsPolicy("none", "")
    return attach_lora(base(), checkpoint, LoraSettings(init=method, **settings), policy).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def adapters(model: Any) -> list[Any]:
    return [layer for layer in model.modules() if hasattr(layer, "lora_A") and len(layer.lora_A)]


@torch.no_grad()
def change(model: Any) -> Any:
    """Train, as it were: add to both matrices of every layer."""
    generator = torch.Generator().manual_seed(0)
    for layer in adapters(model):
        for matrices in (layer.lora_A, layer.lora_B):
            weight = matrices["default"].weight
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return model


@pytest.mark.parametrize("method", METHODS)
def test_gradients_and_values_are_those_of_peft(method: str) -> None:
    targets = ["c_attn", "w1", "w2", "mlp.c_proj"]
    torch.manual_seed(0)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": targets, "init_lora_weights": method}
    theirs: Any = get_peft_model(base(), LoraConfig(**settings)).eval()
    ours = build(method, target_modules=targets)
    for trained, expected in zip(adapters(change(ours)), adapters(change(theirs)), strict=True):
        assert torch.allclose(trained.lora_initial_A["default"] + trained.lora_A["default"].weight,
                              expected.lora_A["default"].weight, atol=1e-5)  # fmt: skip
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-4)
    for model in (ours, theirs):
        model(input_ids=IDS, labels=IDS).loss.backward()
    for trained, expected in zip(adapters(ours), adapters(theirs), strict=True):
        for name in ("lora_A", "lora_B"):
            gradients = [getattr(layer, name)["default"].weight.grad for layer in (trained, expected)]
            torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", [*METHODS, "pissa_niter_2"])
def test_the_model_begins_as_its_base_whose_weights_stay(method: str) -> None:
    plain, model = base().eval(), build(method, **PATTERNS)
    assert torch.equal(logits(model), logits(plain))
    weights = {name.replace(".base_layer", ""): tensor for name, tensor in model.base_model.model.named_parameters()}
    assert all(torch.equal(weights[name], tensor) for name, tensor in plain.named_parameters())
    assert sum(tensor.requires_grad for tensor in model.parameters()) == 2 * len(adapters(model))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_saved_adapter_is_a_plain_one_on_the_base_even_in_16_bits(tmp_path: Path, method: str, rslora: bool) -> None:
    model = change(build(method, rslora=rslora, **PATTERNS))
    with torch.no_grad():
        for layer in adapters(model):  # a small change, as after a few steps
            layer.lora_A["default"].weight *= 0.01
            layer.lora_B["default"].weight *= 0.01
    learnt = logits(model) - logits(base().eval())
    for dtype, error in ((None, 1e-4), (torch.bfloat16, 1e-2)):
        folder = tmp_path / str(dtype)
        folder.mkdir()
        save_adapter(model, dtype, folder)
        saved = load_adapter(base(), str(folder), "--adapter").eval()
        assert is_plain(saved)
        difference = (logits(saved) - logits(model)).norm() / learnt.norm()
        assert difference < error, dtype


def test_dropout_acts_on_the_change_alone() -> None:
    model = build("pissa", dropout=0.5).train()
    assert torch.equal(logits(model), logits(base().eval()))
    first, second = change_of(adapters(model)[0], "default")
    assert not (second @ first).any()


def test_a_rank_beyond_a_weights_size_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--init_lora_weights olora: rank 65 exceeds the weight of .*c_attn, \("):
        build("olora", rank=65)
