"""Loss and token accuracy of a model on single answers of a conversation, and its loss on windows of a text.

Shapes: B windows, T tokens, C hidden size, N positions, V vocabulary rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chat.label_mask import IGNORE_INDEX
from data_utils.encode import Example
from qwen_model.sample_attention import ready_masks

_PART = 256  # positions whose logits are computed at a time


@dataclass(frozen=True)
class TurnLoss:
    """Sums over the targets of one answer.

    Attributes:
        loss: of the cross entropies, in nats.
        correct: targets whose most likely token is right.
    """

    targets: int
    loss: float
    correct: int


@torch.no_grad()
def answer_losses(model: Any, example: Example) -> list[TurnLoss]:
    """Return the loss of each answer of an example, in order: of each run of neighbouring targets.

    Args:
        model: without wrappers, in evaluation mode; its layers may have adapters.
    """
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([example["input_ids"]], device=device)
    hidden = model.base_model(input_ids=ids, use_cache=False)[0][0]  # [T, C]
    labels = example["labels"][1:]
    positions = [index for index, label in enumerate(labels) if label != IGNORE_INDEX]
    targets = torch.tensor([labels[index] for index in positions], device=device)
    losses, correct = _target_losses(model, hidden[positions], targets)
    turns: list[TurnLoss] = []
    before = None
    for position, loss, is_right in zip(positions, losses, correct, strict=True):
        last = turns.pop() if turns and before == position - 1 else TurnLoss(0, 0.0, 0)
        turns.append(TurnLoss(last.targets + 1, last.loss + loss, last.correct + is_right))
        before = position
    return turns


@torch.no_grad()
def window_losses(model: Any, ids: Tensor) -> list[float]:
    """Return the loss of each window: the sum of the cross entropies of all tokens but its first, in nats.

    Args:
        model: as for ``answer_losses``.
        ids: [B, T].
    """
    ids = ids.to(model.get_input_embeddings().weight.device)
    hidden = model.base_model(input_ids=ids, attention_mask=ready_masks(model.config), use_cache=False)[0]  # [B, T, C]
    return [math.fsum(_target_losses(model, hidden[row, :-1], ids[row, 1:])[0]) for row in range(len(ids))]


def _target_losses(model: Any, hidden: Tensor, targets: Tensor) -> tuple[list[float], list[bool]]:
    """Return the cross entropy of each target [N], and whether it is the most likely token; hidden states [N, C].

    The head is called for some positions at a time, whatever it is: only their logits [., V] are in memory.
    """
    losses: list[float] = []
    correct: list[bool] = []
    for start in range(0, len(targets), _PART):
        logits = model.get_output_embeddings()(hidden[start : start + _PART]).float()
        part = targets[start : start + _PART].to(logits.device)
        losses += F.cross_entropy(logits, part, reduction="none").tolist()
        correct += (logits.argmax(-1) == part).tolist()
    return losses, correct
