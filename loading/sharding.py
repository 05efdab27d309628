"""Whole tensors of a model of which every process holds a share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def whole(value: Any) -> Any:
    """A number or tensor as it is on one process, also where FSDP gives a share of it. Called by all processes."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def is_sharded(model: nn.Module) -> bool:
    """Whether a process holds only its share of the parameters (ZeRO-3, FSDP)."""
    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters())


@contextmanager
def gathered_parameter(parameter: Any) -> Iterator[Tensor]:
    """A parameter as it is on one process, for as long as the block lasts. Called by all processes."""
    if isinstance(parameter, DTensor):
        yield parameter.full_tensor()
    elif hasattr(parameter, "ds_id"):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter]):
            yield parameter
    else:
        yield parameter


@torch.no_grad()
def gather_weights(model: nn.Module, only_trained: bool, keep: bool) -> dict[str, Tensor]:
    """The parameters and buffers of a model in the memory of the host, one gathered at a time. Called by all processes.

    Args:
        model: without the wrappers of an engine; its names are those of an unsharded model.
        only_trained: leave out what is frozen, and buffers.
        keep: whether this process wants them; the others only take part.

    Returns:
        Names as in ``model.state_dict()``, of tied parameters both; empty where they are not kept.
    """
    gathered: dict[str, Tensor] = {}
    kept: dict[int, Tensor] = {}  # a tied parameter stays one tensor
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if only_trained and not parameter.requires_grad:
            continue
        if id(parameter) not in kept:
            with gathered_parameter(parameter) as tensor:
                kept[id(parameter)] = tensor.detach().to("cpu", copy=True) if keep else tensor.new_empty(0)
        gathered[name] = kept[id(parameter)]
    if not only_trained:
        state = model.state_dict()
        gathered |= {name: tensor.cpu() for name, tensor in model.named_buffers() if name in state}
    return gathered if keep else {}
