"""Tensors without data that look like those of a GPU, in every build of torch.

A build without CUDA cannot differentiate tensors whose device is CUDA: autograd asks C++ for that device, and aborts.
So the tensors are the CPU's for C++, and Python alone is told that they are CUDA's: what a module, the optimizer or the
loss decides by the device of a tensor, it decides as on a GPU. What torch decides in C++ and matters for memory is
exchanged: autocast, and dropout, which keeps a mask of a byte per value. The attention of torch keeps the same on both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
import torch.optim.optimizer as torch_optimizer
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import modeling_utils

from planning.memory import FollowedMemory

DEVICE = torch.device("cuda", 0)
CAPABILITY = (9, 0)
"""Of the GPUs that are rehearsed: those since Ampere compute alike here."""


@contextmanager
def looking_like_cuda(memory: FollowedMemory) -> Iterator[None]:
    """Let all fake tensors look like CUDA's within the block, except while ``memory`` passes an operator on."""
    own_device: Any = FakeTensor.device
    enabled, dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
    create_autocast = torch.autocast.__init__

    def device(tensor: FakeTensor) -> torch.device:
        own: torch.device = own_device.fget(tensor)
        return own if memory.is_inside or own.type != "cpu" else DEVICE

    def start_autocast(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        create_autocast(self, _own_type(device_type), *args, **kwargs)

    changes: list[Any] = [
        patch.object(FakeTensor, "device", property(device)),
        patch.object(FakeTensor, "is_cuda", property(lambda tensor: tensor.device.type == "cuda"), create=True),
        patch.object(torch, "is_autocast_enabled", lambda device_type="cuda": enabled(_own_type(device_type))),
        patch.object(torch, "get_autocast_dtype", lambda device_type: dtype(_own_type(device_type))),
        patch.object(torch.autocast, "__init__", start_autocast),
        patch.object(F, "dropout", _dropout(F.dropout)),
        patch.object(torch.cuda, "get_device_capability", lambda device=None: CAPABILITY),
        patch.object(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True),
        # Else checkpoints would keep the random states of a real GPU, as tensors with data.
        patch.object(torch.cuda, "_initialized", False),
        # torch's optimizers update many parameters at once where they know the class of a tensor.
        patch.object(torch_optimizer, "_foreach_supported_types", [Tensor, torch.nn.Parameter, FakeTensor]),
    ]
    if hasattr(modeling_utils, "save_on_cpu"):  # of gradient checkpointing with "offload"
        changes.append(patch.object(modeling_utils, "save_on_cpu", _saving_on_host(memory)))
    with ExitStack() as stack:
        for change in changes:
            stack.enter_context(change)
        yield


def _own_type(device_type: str) -> str:
    return "cpu" if device_type == "cuda" else device_type


def _saving_on_host(memory: FollowedMemory) -> Callable[..., Any]:
    """Return ``torch.autograd.graph.save_on_cpu`` for tensors that differ from the CPU's in name only."""

    def pack(tensor: Tensor) -> Tensor:
        with memory.on_host():
            return tensor.clone()

    return lambda *args, **kwargs: saved_tensors_hooks(pack, Tensor.clone)


def _dropout(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if inplace or not training or not 0 < p < 1:
            return original(input, p, training, inplace)
        return torch.native_dropout(input, p, training)[0]

    return dropout
