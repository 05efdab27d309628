"""The training loss of a causal language model from its logits.

Shapes: B batch, T tokens, V vocabulary rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_NO_TARGET = -100  # PyTorch's convention, which the labels of all data follow


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    loss_weights: Tensor | None = None,
) -> Tensor:
    """Cross entropy of each position's logits against the next position's label, in float32.

    Args:
        logits: [B, T, V].
        labels: [B, T], an id or -100; the first of a row is never a target.
        num_items_in_batch: targets in the whole optimizer step, over accumulation and ranks, or the sum of their
            weights; ``None``: those of this batch (the mean). A batch without a target has loss 0, not NaN.
        loss_weights: [B, T], weight of each label's cross entropy; ``None``: 1.
    """
    flat = logits[:, :-1].reshape(-1, logits.shape[-1]).float()
    targets = labels[:, 1:].reshape(-1).to(flat.device)
    if loss_weights is None:
        total = F.cross_entropy(flat, targets, ignore_index=_NO_TARGET, reduction="sum")
        count: Tensor | int = (targets != _NO_TARGET).sum().clamp(min=1)
    else:
        weights = loss_weights[:, 1:].reshape(-1).to(flat.device).float().masked_fill(targets == _NO_TARGET, 0)
        total = (F.cross_entropy(flat, targets, ignore_index=_NO_TARGET, reduction="none") * weights).sum()
        count = weights.sum().clamp(min=torch.finfo(torch.float32).tiny)
    if num_items_in_batch is not None:
        count = num_items_in_batch
    return total / (count.to(total.device) if isinstance(count, Tensor) else count)
