"""The training loss of a causal language model."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from qwen_model.chatml import IGNORE_INDEX


def causal_lm_loss(logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Cross entropy of each position's logits against the next position's label, in float32.

    Args:
        logits: [B, T, V].
        labels: [B, T], an id or -100; the first of a row is never a target.
        num_items_in_batch: targets in the whole optimizer step, over accumulation and processes; ``None`` takes those
            of this batch (the mean). A batch without a target has loss 0, not NaN.
    """
    targets = labels[:, 1:].reshape(-1)
    flat = logits[:, :-1].reshape(-1, logits.shape[-1]).float()
    total = F.cross_entropy(flat, targets.to(flat.device), ignore_index=IGNORE_INDEX, reduction="sum")
    count = (targets != IGNORE_INDEX).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    if isinstance(count, Tensor):
        count = count.to(total.device)
    return total / count
