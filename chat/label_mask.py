r"""Selection of the trained tokens of a conversation: the only file that decides it and converts weights to labels.

``--label_mask`` decides for turns without a weight of their own. Below, ``S`` is ``<|im_start|>``, ``E`` is
``<|im_end|>\n``, and ``.`` is not trained::

    conversation   S system\n Be brief. E  S user\n 1+1? E  S assistant\n 2 E  S user\n 2+2? E  S assistant\n 4 E

    assistant      . .        .         .  . .      .    .  . .           2 E  . .      .    .  . .           4 E
    last           . .        .         .  . .      .    .  . .           . .  . .      .    .  . .           4 E
    qwen           S .        .         E  S .      .    E  S .           2 E  S .      .    E  S .           4 E
    all            S system\n Be brief. E  S user\n 1+1? E  S assistant\n 2 E  S user\n 2+2? E  S assistant\n 4 E

``qwen`` is the mask of Qwen v1's original script. Tool results are trained by ``all`` only. An answer that has no
inference prompt (``chat.answers``) could never be generated, so ``all`` alone trains it. A turn's own weight overrides
the mask: 0 does not train the turn, 0.5 halves its share of the loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from functools import lru_cache
from typing import Literal, NamedTuple

from chat.turns import Turn

IGNORE_INDEX = -100
"""Label of a token that is not trained, by the convention of torch and transformers."""

LabelMask = Literal["assistant", "qwen", "last", "all"]


def turn_weights(turns: Sequence[Turn], label_mask: LabelMask, promptable: Set[int]) -> list[float]:
    """Return the loss weight of each turn's text: its own weight if it has one, otherwise 1 or 0 by the mask.

    Args:
        promptable: indices of the answers that have an inference prompt.
    """
    # Only answers can be promptable: a mask that trains other turns must add them to ``trained``, as "all" does.
    answers = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
    trained: Set[int]
    if label_mask == "all":
        trained = set(range(len(turns)))
    elif label_mask == "last":
        trained = promptable & set(answers[-1:])
    else:
        trained = promptable & set(answers)
    return [float(index in trained) if turn.weight is None else turn.weight for index, turn in enumerate(turns)]


class FrameWeights(NamedTuple):
    """Loss weights of the parts of a message around its content: ``<|im_start|>``, ``role\\n``, ``<|im_end|>\\n``."""

    start: float
    header: float
    end: float


@lru_cache(maxsize=256)
def frame_weights(
    own_weight: float | None, last_weight: float, label_mask: LabelMask, awaits_result: bool
) -> FrameWeights:
    """Return the loss weights of the frame of a message.

    Args:
        own_weight: ``Turn.weight`` of the message's first turn.
        last_weight: weight of the end of its content.
        awaits_result: a call waits for its result, so the model does not end the message here.
    """
    trains_frame = label_mask in ("qwen", "all")
    start = (1.0 if own_weight is None else own_weight) if trains_frame else 0.0
    return FrameWeights(
        start=start,
        header=start if label_mask == "all" else 0.0,
        # An answer is trained together with its end, otherwise the model would not learn to stop.
        end=0.0 if awaits_result else last_weight or start,
    )


def labels_from_weights(input_ids: Sequence[int], runs: Iterable[tuple[int, float]]) -> list[int]:
    """Return the T labels of T ids; they are not shifted.

    Args:
        runs: length and loss weight of each run of neighbouring ids; the lengths add up to T.
    """
    labels: list[int] = []
    for length, weight in runs:
        ids = input_ids[len(labels) : len(labels) + length]
        # Wherever the weight is 0 the label is IGNORE_INDEX: that token is not trained.
        labels += ids if weight > 0 else [IGNORE_INDEX] * length
    assert len(labels) == len(input_ids), "runs that do not cover the ids"
    return labels
