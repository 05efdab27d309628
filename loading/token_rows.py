"""Trained rows of a frozen embedding or head, without a copy of the matrix.

peft's trainable tokens write the trained rows into a copy of the whole matrix at every forward pass and give it a dense
gradient: twice the vocabulary times the hidden size, for two rows. This subclass of peft's layer changes only the
forward pass; its parameters and files stay peft's, which other tools read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from torch import Tensor, nn

from loading.sharding import gathered_parameter


class LeanTrainableTokens(TrainableTokensLayer):
    """peft's layer, with outputs of the frozen matrix replaced by those of the trained rows."""

    def forward_adapters(self, x: Tensor, active_adapters: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Compute embeddings [B, T, C] of ids [B, T], or logits [B, T, V] of states [B, T, C].

        Without exactly one active adapter, peft's own method is called.
        """
        is_other = self.disable_adapters or self.merged or len(active_adapters) != 1
        base = self.get_base_layer()
        if is_other or not isinstance(base, (nn.Embedding, nn.Linear)):
            return super().forward_adapters(x, active_adapters, *args, **kwargs)
        output = base(x)
        (name,) = active_adapters
        ids = torch.tensor(self.token_indices[name], device=x.device)
        if isinstance(base, nn.Linear):
            logits = F.linear(x, self.trainable_tokens_delta[name].to(x.dtype))
            return output.index_copy(-1, ids, logits.to(output.dtype))
        matches = x[..., None] == ids
        rows = F.embedding(matches.long().argmax(-1), self.trainable_tokens_delta[name].to(output.dtype))
        return torch.where(matches.any(-1, keepdim=True), rows, output)


def use_lean_trainable_tokens(modules: Iterable[nn.Module]) -> None:
    """Replace all of peft's trainable-tokens layers among the modules of a model by lean ones."""
    for module in modules:
        if type(module) is TrainableTokensLayer:
            module.__class__ = LeanTrainableTokens


@contextmanager
def sharded_token_rows() -> Iterator[None]:
    """Let peft read the initial rows from a matrix sharded by ZeRO-3; its own code does so on CUDA only."""
    layer_class: Any = TrainableTokensLayer
    original = layer_class._collect_token_weights
    layer_class._collect_token_weights = _collect_rows
    try:
        yield
    finally:
        layer_class._collect_token_weights = original


def _collect_rows(layer: nn.Module, weight: Tensor, rows: list[int], width: int) -> Tensor:
    with gathered_parameter(weight) as matrix:
        return matrix.detach()[rows].clone()
