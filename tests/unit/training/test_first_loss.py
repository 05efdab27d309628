"""Which weights are taken for random ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qwen_model.lean_models import model_class_of
from tests.models import DELTA_NETS
from training.first_loss import is_untrained

SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip


@pytest.mark.parametrize(("model_type", "more"), [("qwen2", {}), ("qwen3_5_text", {**DELTA_NETS, "head_dim": 8})])
def test_weights_are_untrained_until_a_norm_changes(model_type: str, more: dict[str, Any]) -> None:
    model_class = model_class_of(model_type)
    model = model_class(model_class.config_class(**SIZES, **more))
    assert is_untrained(model)
    with torch.no_grad():
        model.model.norm.weight[0] += 0.01
    assert not is_untrained(model)
