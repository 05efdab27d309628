"""Gradients of an embedding and of a head that are added to the matrix's ``grad`` where they are computed.

Autograd makes a matrix of each, and keeps that of a tied head until the embedding's is known, at the end of the
backward pass.

Shapes: N tokens, C hidden size, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_IS_ALLOWED = ContextVar("_IS_ALLOWED", default=False)


@contextmanager
def summing_in_place(is_allowed: bool = True) -> Iterator[None]:
    """Let embeddings and the lean loss add to ``grad`` themselves, within the block.

    The head's gradient is added when the loss is computed, so a loss of the block has to be differentiated once and as
    it is, not times a factor. Autograd does not see these gradients: no engine may wait for them.
    """
    token = _IS_ALLOWED.set(is_allowed)
    try:
        yield
    finally:
        _IS_ALLOWED.reset(token)


def is_summed_in_place(weight: Any) -> bool:
    """Return whether the gradient of a matrix is added to its ``grad``; one that hooks are called with is not."""
    return bool(
        _IS_ALLOWED.get()
        and torch.is_grad_enabled()
        and weight.requires_grad
        and weight.is_leaf
        and not (weight._backward_hooks or weight._post_accumulate_grad_hooks)
    )


def gradient_of(weight: Tensor) -> Tensor:
    """Return the ``grad`` of a matrix, of zeros if it had none."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


class SummingEmbedding(nn.Embedding):
    """transformers' embedding, [N] -> [N, C]."""

    def forward(self, input: Tensor) -> Tensor:
        if not is_summed_in_place(self.weight):
            return super().forward(input)
        output: Tensor = _Lookup.apply(self.weight, input, self.padding_idx)
        return output


class _Lookup(torch.autograd.Function):
    """Rows of a matrix [V, C], whose gradients are added to its ``grad``."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding: int | None) -> Tensor:
        ctx.weight, ctx.padding = weight, padding
        ctx.save_for_backward(ids)
        return nn.functional.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (ids,) = ctx.saved_tensors
        if ctx.padding is not None:  # its row is not trained
            gradient = gradient.masked_fill((ids == ctx.padding)[..., None], 0)
        # index_add_ would be in another order each time on a GPU.
        gradient_of(ctx.weight).index_put_((ids,), gradient, accumulate=True)
        return None, None, None
