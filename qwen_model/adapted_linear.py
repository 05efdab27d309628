"""The linear layers of a block, which may have adapters."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


def project(hidden: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """Return the outputs of linear layers that share their input.

    Args:
        hidden: [..., C].
        layers: plain, quantised or adapted linear layers from C features; wrappers of other kinds are called.
    """
    return tuple(layer(hidden) for layer in layers)


def project_gated(gate: Tensor, up: Tensor, layer: nn.Module) -> Tensor:
    """Return ``layer(silu(gate) * up)``.

    Args:
        gate, up: [..., C].
        layer: as those of :func:`project`.
    """
    output: Tensor = layer(F.silu(gate) * up)
    return output
