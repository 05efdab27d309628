"""Projections within sharded modules: FSDP2 gathers parameters in the hooks of a block, or in those of a layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from qwen_model.adapted_linear import project, project_gated
from tests.unit.qwen_model.test_adapted_linear import SIZE, build, call, call_gated, difference, is_fused, outputs_of


@pytest.fixture
def mesh() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


class Block(nn.Module):
    def __init__(self, model: Any, *functions: Any) -> None:
        super().__init__()
        self.model, self.functions, self.outputs = model, functions, []

    def forward(self, hidden: Tensor) -> Tensor:
        self.outputs = outputs_of(self.model, hidden, *self.functions)
        return torch.cat(self.outputs, -1)


def gradients(block: Block) -> dict[str, Tensor]:
    torch.manual_seed(1)
    hidden = torch.randn(3, SIZE, requires_grad=True)
    block(hidden).sin().sum().backward()
    grads = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
    whole = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in grads.items()}
    return whole | {"hidden": hidden.grad}  # type: ignore[dict-item]


@pytest.mark.parametrize("sharded", ["block", "layer"])
def test_gradients_are_those_of_whole_parameters(mesh: Any, sharded: str) -> None:
    expected = gradients(Block(build(dropout=0.3), call, call_gated))
    block = Block(build(dropout=0.3), project, project_gated)
    if sharded == "layer":
        fully_shard(block.model.base_model.model.down, mesh=mesh)
    fully_shard(block, mesh=mesh)
    for _ in range(2):  # the second time parameters have been sharded and gathered again
        block.zero_grad()
        found = gradients(block)
        assert found.keys() == expected.keys()
        assert all(difference(found[name], expected[name]) < 1e-6 for name in expected)
    assert is_fused(block.outputs[0]) and is_fused(block.outputs[-1]) == (sharded == "block")
