"""Dropout on the input of adapters, with a cost proportional to the share that is dropped on a CPU.

On a CPU torch draws 64 random bits per value, one value after the other, which takes half as long as the product of a
layer. Here the gaps between dropped values are drawn, which have a geometric distribution: 1 / p times fewer numbers,
and 4 p bytes per value to save instead of 1 for a mask. On other devices the random numbers are ``nn.Dropout``'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class AdapterDropout(nn.Dropout):
    """``nn.Dropout`` whose random numbers on a CPU are those of :func:`drop`."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not 0 < self.p < 1 or not _draws_gaps(input) or torch.compiler.is_compiling():
            return super().forward(input)  # compiled, it is a part of the kernel that reads the input
        output: Tensor = _Drop.apply(input, self.p)
        return output


def drop(x: Tensor, p: float) -> tuple[Tensor, Tensor, float]:
    """Set each value to zero with the probability ``p``.

    Returns:
        The values, where they are zero (see :func:`drop_again`), and a factor of the values: multiplied by it, their
        expectation is ``x``.
    """
    if _draws_gaps(x):
        where = _draw_positions(x.numel(), p)
        return drop_again(x, where), where, 1 / (1 - p)
    dropped, is_kept = torch.native_dropout(x, p, True)
    return dropped, is_kept, 1.0


def drop_again(x: Tensor, where: Tensor, in_place: bool = False) -> Tensor:
    """Set the values to zero that :func:`drop` did, in a copy unless ``x`` may be changed."""
    if where.dtype == torch.bool:
        return x.mul_(where) if in_place else x * where
    return _with_zeros(x, x.shape, where, lambda values: values.copy_(x))


def drop_product(left: Tensor, right: Tensor, where: Tensor) -> Tensor:
    """Return ``left @ right`` with the values set to zero that :func:`drop` set to zero in a tensor of its shape."""
    if where.dtype == torch.bool:
        return torch.mm(left, right).mul_(where)
    shape = torch.Size((left.shape[0], right.shape[1]))
    return _with_zeros(left, shape, where, lambda values: torch.mm(left, right, out=values))


def _draws_gaps(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _draw_positions(count: int, p: float) -> Tensor:
    """Draw which of ``count`` values are dropped: increasing positions, and ``count`` for those behind the end.

    Their number is fixed, because reading how many are needed is impossible for tensors without data: the expected one
    and eight standard deviations.
    """
    enough = math.ceil(count * p + 8 * math.sqrt(count * p)) + 16
    gaps = torch.rand(enough).neg_().log1p_().mul_(1 / math.log1p(-p)).to(torch.int32)  # values kept in between
    return gaps.add_(1).cumsum(0, dtype=torch.int32).sub_(1).clamp_(max=count)


def _with_zeros(like: Tensor, shape: torch.Size, positions: Tensor, write: Callable[[Tensor], object]) -> Tensor:
    flat = like.new_empty(shape.numel() + 1)  # the last one is for positions behind the end
    values = flat[:-1].view(shape)
    write(values)
    flat.index_fill_(0, positions.long(), 0)
    return values


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        dropped, where, ctx.factor = drop(x, p)
        ctx.save_for_backward(where)
        return dropped.mul_(ctx.factor)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (where,) = ctx.saved_tensors
        return drop_again(gradient, where).mul_(ctx.factor), None


def use_adapter_dropout(modules: Iterable[nn.Module]) -> None:
    """Replace the dropout of all LoRA adapters among the modules of a model."""
    for module in modules:
        for dropout in getattr(module, "lora_dropout", {}).values():
            if type(dropout) is nn.Dropout:
                dropout.__class__ = AdapterDropout
