"""Which turns of a conversation are trained, and the labels that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from chat.answers import Answers
from chat.families import Family
from chat.turns import Turn

IGNORE_INDEX = -100
"""The label of an id that is not learnt, torch's and transformers' convention."""


LabelMask = Literal["assistant", "qwen", "last", "all"]


def _weights(
    turns: Sequence[Turn], answers: Answers, family: Family, label_mask: LabelMask, adds_system: bool
) -> list[float]:
    """The weight of each turn in the loss: its own, else what the mask gives it."""
    indices = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
    masked = set(indices[-1:] if label_mask == "last" else indices)
    if label_mask != "all":
        # No prompt of the later templates leads to an answer that opens the conversation.
        first = 1 if turns and turns[0].role == "system" else 0
        if (adds_system or not first) and not family.trains_opening:
            masked.discard(first)
        masked &= answers.asked_for()
    return [
        turn.weight if turn.weight is not None else float(label_mask == "all" or index in masked)
        for index, turn in enumerate(turns)
    ]
