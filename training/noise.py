"""NEFTune: uniform noise on the embeddings while a model trains, by the length of each sample.

transformers takes the length of a row for that of a sample; here a row may hold several.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def embedding_noise(model: Any, alpha: float | None) -> Iterator[None]:
    """Add noise to the embeddings of a model in training mode, for the duration of the block.

    Args:
        model: without the wrappers of an engine. A row without padding is recognised by ``cu_seq_lens_q``, as
            ``data_utils.collate`` gives it.
        alpha: ``--neftune_noise_alpha``; ``None`` or 0: no noise.
    """
    if not alpha:
        yield
        return
    starts: list[Tensor | None] = [None]

    def remember(module: nn.Module, inputs: Any, keywords: Mapping[str, Any]) -> None:
        starts[0] = keywords.get("cu_seq_lens_q")

    def add_noise(module: nn.Module, inputs: Any, embeddings: Tensor) -> Tensor | None:
        return embeddings + noise_like(embeddings, alpha, starts[0]) if module.training else None

    hooks = (
        model.register_forward_pre_hook(remember, with_kwargs=True),
        model.get_input_embeddings().register_forward_hook(add_noise),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def noise_like(embeddings: Tensor, alpha: float, starts: Tensor | None) -> Tensor:
    """Return noise from -m to m, where m is ``alpha`` / sqrt(tokens of the sample x C).

    Args:
        embeddings: [B, T, C] of padded samples, whose length is taken to be T, or [1, N, C] of a row.
        starts: [B + 1] ends of the samples of a row, after a 0; ``None``: the samples are padded.
    """
    _, tokens, width = embeddings.shape
    noise = torch.empty_like(embeddings).uniform_(-1, 1)
    if starts is None:
        return noise * (alpha / (tokens * width) ** 0.5)
    lengths = starts.to(embeddings.device).diff()
    limits = alpha / (lengths * width).float().sqrt()
    return noise * limits.repeat_interleave(lengths, output_size=tokens)[None, :, None].to(embeddings.dtype)
