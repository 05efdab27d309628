"""Rotary tables, dynamic NTK and log-n scaling of Qwen v1, computed from the config at each forward.

Nothing here is a module buffer: ``from_pretrained`` can leave buffers that are not in the checkpoint uninitialised, and
the tables cost a few small kernels per forward pass.

Shapes: B batch, T tokens, D head size, R rotated channels of a head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

RotaryTables = tuple[Tensor, Tensor]


def ntk_alpha(lengths: Tensor, seq_length: int) -> Tensor:
    """Compute the dynamic-NTK factor of each row: ``max(2 ** ceil(log2(length / seq_length) + 1) - 1, 1)``.

    Args:
        lengths: number of real tokens of each row, [B].

    Returns:
        float64 [B]; 1 up to ``seq_length``, then 3, 7, 15...
    """
    doublings = torch.ceil(torch.log2(lengths.double() / seq_length) + 1)
    return (2.0**doublings - 1).clamp(min=1)


def rotary_tables(position_ids: Tensor, dim: int, base: float, alpha: Tensor | None = None) -> RotaryTables:
    """Compute cos and sin of the rotation angles, float32 [B, T, R]; both halves of R are equal.

    Args:
        position_ids: [B, T] or [1, T].
        dim: R.
        base: ``rotary_emb_base``.
        alpha: dynamic-NTK factor of each row, [B]; ``None``: 1.
    """
    exponents = torch.arange(0, dim, 2, device=position_ids.device, dtype=torch.float32) / dim
    if alpha is None:
        inv_freq = (1.0 / (base**exponents))[None]
    else:
        bases = (base * alpha.double() ** (dim / (dim - 2))).float()
        inv_freq = 1.0 / (bases[:, None] ** exponents[None])
    angles = position_ids[:, :, None].float() * inv_freq[:, None, :]
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(states: Tensor, tables: RotaryTables) -> Tensor:
    """Rotate the first R channels of queries or keys in float32 (half-split layout).

    Args:
        states: [B, H, T, D].
        tables: cos and sin, [B, T, R].
    """
    cos, sin = (table[:, None] for table in tables)
    rotated = states[..., : cos.shape[-1]].float()
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((rotated.to(states.dtype), states[..., cos.shape[-1] :]), dim=-1)


def logn_scale(position_ids: Tensor, seq_length: int) -> Tensor:
    """Compute the factor of the query at each position: ``log(p + 1) / log(seq_length)`` beyond ``seq_length``, else 1.

    Returns:
        float32, the shape of ``position_ids``.
    """
    scale = torch.log((position_ids + 1).clamp(min=1).double()) / math.log(seq_length)
    return scale.clamp(min=1).float()
