"""Loss and token accuracy of a model on single answers of a conversation, and its loss on windows of a text.

Shapes: B rows, T tokens, C hidden size, N positions, V vocabulary rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chat.label_mask import IGNORE_INDEX
from data_utils.encode import Example
from qwen_model.sample_attention import ready_masks

TOKENS = 4096
"""Tokens that are computed at a time, padding included; a longer row is computed alone."""
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


def batches_of(rows: Sequence[Sequence[int]], most_rows: int | None = None) -> Iterator[list[int]]:
    """Yield the indices of rows that are computed together: those of similar length, the longest first."""
    ordered = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    while ordered:
        at_once = max(1, TOKENS // len(rows[ordered[0]])) if most_rows is None else most_rows
        yield ordered[:at_once]
        ordered = ordered[at_once:]


@torch.no_grad()
def hidden_states(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    """Return the last hidden states of rows of ids, [B, T, C], padded on the right: each row has those it has alone.

    Args:
        model: without wrappers, in evaluation mode; its layers may have adapters.
    """
    device = model.get_input_embeddings().weight.device
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *([0] * (longest - len(row)))] for row in rows], device=device)
    mask: Any = ready_masks(model.config)
    # With dynamic NTK the rotary base of a row depends on its length.
    if min(map(len, rows)) < longest and (mask is None or getattr(model.config, "use_dynamic_ntk", False)):
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    hidden: Tensor = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
    return hidden


def answer_losses(model: Any, examples: Sequence[Example]) -> list[list[TurnLoss]]:
    """Return for each example the loss of each of its answers, in order: of each run of neighbouring targets.

    Args:
        model: as for ``hidden_states``.
    """
    found: dict[int, list[TurnLoss]] = {}
    rows = [example["input_ids"] for example in examples]
    for batch in batches_of(rows):
        for index, hidden in zip(batch, hidden_states(model, [rows[index] for index in batch]), strict=True):
            found[index] = _turn_losses(model, hidden, examples[index]["labels"][1:])
    return [found[index] for index in range(len(examples))]


@torch.no_grad()
def _turn_losses(model: Any, hidden: Tensor, labels: Sequence[int]) -> list[TurnLoss]:
    """Return the losses of the answers of a row.

    Args:
        hidden: states of the row and of padding behind it, [T, C].
        labels: the token behind each position, but for the last one.
    """
    positions = [index for index, label in enumerate(labels) if label != IGNORE_INDEX]
    targets = torch.tensor([labels[index] for index in positions], device=hidden.device)
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
        model: as for ``hidden_states``.
        ids: [B, T].
    """
    hidden = hidden_states(model, ids.tolist())
    ids = ids.to(hidden.device)
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
