"""LoRA+: the groups of an optimizer, with their settings."""

from __future__ import annotations

import torch
from torch import nn

from training.learning_rates import raise_rate_of_second


def test_second_matrices_get_groups_of_their_own_with_all_other_settings() -> None:
    model = nn.ModuleDict({
        "embed": nn.Linear(2, 2), "lora_A": nn.ModuleDict({"x": nn.Linear(2, 2)}),
        "lora_B": nn.ModuleDict({"x": nn.Linear(2, 2)}),
    })  # fmt: skip
    wrapper = nn.ModuleDict({"layer": model})
    matrices = [parameter for name, parameter in wrapper.named_parameters() if name.endswith("weight")]
    biases = [parameter for name, parameter in wrapper.named_parameters() if name.endswith("bias")]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0, "betas": (0.5, 0.6)}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    raise_rate_of_second(optimizer, wrapper, 16)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-3, 16e-3, 16e-3]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0, 0.1, 0.0]
    assert [group["betas"] for group in optimizer.param_groups] == [(0.9, 0.999), (0.5, 0.6)] * 2
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2, 1, 1]
    assert optimizer.param_groups[2]["params"] == [wrapper["layer"]["lora_B"]["x"].weight]
