"""Conversations of one shape: the same authors and weights, and texts that do not decide how they are written.

They are rendered once, with placeholders for their texts. Of each conversation only its texts are then tokenised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from chat.families import THINK, THINK_END, Family
from chat.render import EncodeText
from chat.segments import Message
from chat.turns import Turn

_ROLES = {"system", "user", "assistant"}
_WEIGHTS = {None, 0.0, 1.0}
_MOST_TURNS = 32


class Part(NamedTuple):
    """Part of a span: ids that are always the same, then a text of a turn and what is tokenised together with it."""

    ids: tuple[int, ...]
    before: str = ""
    turn: int | None = None


class Shape(NamedTuple):
    """What conversations of one shape have in common.

    Attributes:
        spans: author, weight and parts of each span.
        answers: number of trained answers.
    """

    spans: Sequence[tuple[str, float, Sequence[Part]]]
    answers: int


def has_shape(turns: Sequence[Turn], family: Family) -> bool:
    """Return whether a conversation is written like others: no call, result or thinking in it decides how.

    Long ones, and weights that few others have, are left out: a shape is worth its time and memory if it occurs again.
    """
    if not 0 < len(turns) <= _MOST_TURNS:
        return False
    if family.own_template is not None:
        return False
    has_marks = family.has_thinking or bool(family.prompt_suffix)
    may_trim = family.is_strict or bool(family.trimmed_roles)
    if turns[0].role == "system" and not turns[0].content and (family.instructions or not family.writes_blank_system):
        return False  # without the line ends, or the turn, of one that has a text
    for role, content, calls, weight, thinking in turns:
        if may_trim and family.is_trimmed(role) and content != content.strip():
            return False
        if calls or thinking or role not in _ROLES or weight not in _WEIGHTS:
            return False
        if has_marks and (content.startswith(("<tool_response>", "\n")) or THINK in content or THINK_END in content):
            return False
    return True


def build_shape(
    roles: Sequence[str],
    weights: Sequence[float | None],
    render: Callable[[Sequence[Turn]], Sequence[Message]],
    encode_text: EncodeText,
    control_ids: dict[str, int],
) -> Shape:
    """Return the shape of the conversations with these authors and weights.

    Args:
        render: writes a conversation.
    """
    placeholders = {f"\0turn {index}\0": index for index in range(len(roles))}
    turns = [Turn(role, text, (), weight) for role, text, weight in zip(roles, placeholders, weights, strict=True)]
    spans: list[tuple[str, float, list[Part]]] = []
    messages = render(turns)
    for text, is_control, weight, role in (segment for message in messages for segment in message.segments):
        if not spans or spans[-1][:2] != (role, weight):
            spans.append((role, weight, []))
        parts = spans[-1][2]
        found = None if is_control else next((name for name in placeholders if name in text), None)
        if found is not None:
            before, _, after = text.partition(found)
            assert not after, "nothing is tokenised together with the end of a text"
            parts.append(Part((), before, placeholders[found]))
        elif ids := [control_ids[text]] if is_control else encode_text(text):
            parts.append(Part(tuple(ids)))
    joined = [(role, weight, _joined(parts)) for role, weight, parts in spans if parts]
    return Shape(joined, sum(len(message.trained) for message in messages))


def _joined(parts: Sequence[Part]) -> list[Part]:
    """Return the parts, with ids of parts without a text at the start of the next one."""
    joined: list[Part] = []
    for part in parts:
        if joined and joined[-1].turn is None:
            part = part._replace(ids=joined.pop().ids + part.ids)
        joined.append(part)
    return joined
