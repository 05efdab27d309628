"""Gathering the tensors of a sharded model: ZeRO-3 or FSDP, where every rank holds a shard of each parameter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def gather(value: Any) -> Any:
    """Return a number or tensor unsharded, if FSDP sharded it. Called on all ranks."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def is_sharded(model: nn.Module) -> bool:
    """Return whether a rank holds only a shard of the parameters."""
    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters())


@contextmanager
def gathered_parameter(parameter: Any) -> Iterator[Tensor]:
    """Gather a parameter for the duration of the block. Called on all ranks."""
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
    """Gather the parameters and buffers of a model into CPU memory, one at a time. Called on all ranks.

    Args:
        model: without the wrappers of an engine, so that names are those of the unsharded model.
        only_trained: leave out frozen parameters and buffers.
        keep: whether this rank returns the tensors; the others only take part in gathering.

    Returns:
        Tensors by their names in ``model.state_dict()``, tied parameters under both; empty without ``keep``.
    """
    gathered: dict[str, Tensor] = {}
    by_parameter: dict[int, Tensor] = {}  # a tied parameter stays one tensor
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if only_trained and not parameter.requires_grad:
            continue
        if id(parameter) not in by_parameter:
            with gathered_parameter(parameter) as tensor:
                by_parameter[id(parameter)] = tensor.detach().to("cpu", copy=True) if keep else tensor.new_empty(0)
        gathered[name] = by_parameter[id(parameter)]
    if not only_trained:
        state = model.state_dict()
        gathered |= {name: tensor.cpu() for name, tensor in model.named_buffers() if name in state}
    return gathered if keep else {}
