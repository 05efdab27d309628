"""Rows of an embedding or a head that train apart, without a copy of it.

peft's trainable tokens write the trained rows into a copy of the whole matrix at every forward pass and give it a dense
gradient: twice the vocabulary times the hidden size, for two rows. Its files are what others read, so the layer stays
peft's; only the way it looks rows up is ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from torch import Tensor, nn

from loading.sharding import gathered_parameter


class LeanTrainableTokens(TrainableTokensLayer):
    """peft's layer; what comes of the frozen matrix is taken, and what comes of the trained rows put in its places."""

    def forward_adapters(self, x: Tensor, active_adapters: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Embeddings [B, T, C] of ids [B, T], or logits [B, T, V] of states [B, T, C].

        Anything but one trained adapter is left to peft.
        """
        plain = self.disable_adapters or self.merged or len(active_adapters) != 1
        base = self.get_base_layer()
        if plain or not isinstance(base, (nn.Embedding, nn.Linear)):
            result: Tensor = super().forward_adapters(x, active_adapters, *args, **kwargs)
            return result
        embedded = base(x)
        (name,) = active_adapters
        ids = torch.tensor(self.token_indices[name], device=x.device)
        if isinstance(base, nn.Linear):
            logits = F.linear(x, self.trainable_tokens_delta[name].to(x.dtype))
            return embedded.index_copy(-1, ids, logits.to(embedded.dtype))
        matches = x[..., None] == ids
        rows = F.embedding(matches.long().argmax(-1), self.trainable_tokens_delta[name].to(embedded.dtype))
        return torch.where(matches.any(-1, keepdim=True), rows, embedded)


def use_lean_trainable_tokens(model: nn.Module) -> None:
    """Let every layer of trained rows in a model look them up the lean way."""
    for module in model.modules():
        if type(module) is TrainableTokensLayer:
            module.__class__ = LeanTrainableTokens


@contextmanager
def sharded_token_rows() -> Iterator[None]:
    """Let peft take the rows it starts from out of a matrix that ZeRO-3 shares out; its own way works on CUDA only."""
    layer_class: Any = TrainableTokensLayer
    theirs = layer_class._collect_token_weights
    layer_class._collect_token_weights = _collect_rows
    try:
        yield
    finally:
        layer_class._collect_token_weights = theirs


def _collect_rows(layer: nn.Module, weight: Tensor, rows: list[int], width: int) -> Tensor:
    with gathered_parameter(weight) as matrix:
        return matrix.detach()[rows].clone()
