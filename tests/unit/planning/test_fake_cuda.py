"""Fake tensors that look like a GPU's: to Python code, to autocast, to dropout; and only within the block."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from planning.fake_cuda import DEVICE, looking_like_cuda
from planning.memory import FollowedMemory


@pytest.fixture
def memory() -> Iterator[FollowedMemory]:
    with FakeTensorMode(), FollowedMemory("cuda", {}, (8,)) as memory, looking_like_cuda(memory):
        memory.enter("forward")
        yield memory


def test_code_sees_tensors_of_a_gpu_and_makes_others_like_them(memory: FollowedMemory) -> None:
    states = torch.empty(8, 16)
    assert states.device == DEVICE and states.is_cuda
    for made in (
        torch.zeros(3, device=states.device),
        states.new_ones(2),
        torch.arange(4, device="cuda") * states[0, 0],
    ):
        assert made.is_cuda
    assert torch.nn.Parameter(states).is_cuda


def test_products_take_autocasts_dtype_and_have_gradients(memory: FollowedMemory) -> None:
    layer, states = nn.Linear(16, 4), torch.empty(8, 16)
    with torch.autocast(states.device.type, dtype=torch.bfloat16):
        assert torch.is_autocast_enabled() and torch.is_autocast_enabled("cuda")
        assert torch.get_autocast_dtype("cuda") == torch.bfloat16
        output = layer(states)
        with torch.autocast("cuda", enabled=False):
            assert layer(states).dtype == torch.float32
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.is_cuda


def test_dropout_keeps_a_byte_per_value(memory: FollowedMemory) -> None:
    states = torch.empty(1024, 16, requires_grad=True)
    memory.begin()
    dropped = F.dropout(states, 0.1)
    kept = sum(memory.moments(lambda phase, place: "all")["all"].components.values())
    assert kept == states.numel() * (4 + 4 + 1)
    assert dropped.requires_grad


def test_read_of_a_value_raises(memory: FollowedMemory) -> None:
    with pytest.raises(DataDependentOutputException):
        torch.empty(()).item()
    with pytest.raises(DataDependentOutputException):
        torch.empty(4).tolist()


def test_nothing_looks_like_cuda_after_the_block() -> None:
    with FakeTensorMode():
        memory = FollowedMemory("cuda", {}, (8,))
        with looking_like_cuda(memory):
            assert torch.empty(1).is_cuda
        states = torch.empty(1)
        assert states.device.type == "cpu" and not states.is_cuda
        assert not torch.is_autocast_enabled("cuda")
