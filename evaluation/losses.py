"""Loss and token accuracy of a model on single answers of a conversation.

Shapes: T tokens, C hidden size, N positions of a part, V vocabulary rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from chat.label_mask import IGNORE_INDEX
from data_utils.encode import Example

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
    losses: list[float] = []
    correct: list[bool] = []
    for start in range(0, len(positions), _PART):
        part = torch.tensor(positions[start : start + _PART], device=hidden.device)
        logits = model.get_output_embeddings()(hidden[part]).float()  # [N, V]
        targets = torch.tensor([labels[index] for index in positions[start : start + _PART]], device=logits.device)
        losses += F.cross_entropy(logits, targets, reduction="none").tolist()
        correct += (logits.argmax(-1) == targets).tolist()
    turns: list[TurnLoss] = []
    before = None
    for position, loss, is_right in zip(positions, losses, correct, strict=True):
        last = turns.pop() if turns and before == position - 1 else TurnLoss(0, 0.0, 0)
        turns.append(TurnLoss(last.targets + 1, last.loss + loss, last.correct + is_right))
        before = position
    return turns
