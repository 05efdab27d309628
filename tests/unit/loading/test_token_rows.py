"""Trained rows without a copy of the matrix give the same results as peft's own layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from loading.token_rows import LeanTrainableTokens, use_lean_trainable_tokens
from qwen_model.lean_models import LeanQWenLMHeadModel
from qwen_model.modeling_qwen import QWenLMHeadModel
from tests.golden import SMALL, relative_difference

IDS = torch.tensor([[701, 5, 9, 702, 33, 701, 40, 41, 702, 7]])


def build(lean: bool) -> PeftModel:
    torch.manual_seed(0)
    model: Any = LeanQWenLMHeadModel.from_pretrained(SMALL / "tiny-qwen-small", dtype=torch.float32)
    rows = {"wte": [701, 702], "lm_head": [701, 702]}
    model = get_peft_model(
        model, LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", trainable_token_indices=rows)
    )
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    if lean:
        use_lean_trainable_tokens(model.modules())
        assert sum(isinstance(module, LeanTrainableTokens) for module in model.modules()) == 2
    return model.train()


@pytest.mark.parametrize("loss_only", [False, True])
def test_lean_layer_equals_pefts(loss_only: bool) -> None:
    plain, lean = build(False), build(True)
    expected = plain(input_ids=IDS, labels=IDS)
    actual = lean(input_ids=IDS, labels=IDS, loss_only=loss_only)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-6, atol=0)
    expected.loss.backward()
    actual.loss.backward()
    wanted = dict(plain.named_parameters())
    compared = 0
    for name, parameter in lean.named_parameters():
        if parameter.requires_grad:
            assert relative_difference(parameter.grad, wanted[name].grad) <= 1e-5, name
            compared += "trainable_tokens_delta" in name
    assert compared == 2


def test_disabled_adapter_leaves_the_base() -> None:
    base = QWenLMHeadModel.from_pretrained(SMALL / "tiny-qwen-small", dtype=torch.float32).eval()
    model = build(True).eval()
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(model(input_ids=IDS).logits, base(input_ids=IDS).logits)
