"""What remains of a sample that has too many tokens."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

from chat.answers import is_question
from chat.segments import Message
from chat.turns import Turn
from data_utils.report.samples import Encoded

Render = Callable[[Sequence[Turn]], list[Message]]
Encode = Callable[[Sequence[Message]], Encoded]


def keep_oldest(
    turns: Sequence[Turn], messages: Sequence[Message], render: Render, encode: Encode
) -> list[Message] | None:
    """Return the longest start of the conversation that fits, has an answer and, if possible, trains something.

    Reasoning families may train an answer only if it is the last one. A message's length depends on whether it is
    the last one, so the first message that did not fit may fit as the last one, and those that fitted may not.

    Args:
        messages: those that fitted, and the next one.
    """
    longest = None
    for message in reversed(messages):
        kept = turns[: message.end]
        if len(kept) == len(turns):
            continue
        if not kept or _has_answer(turns) > _has_answer(kept):
            break
        try:
            shorter = render(kept)
        except ValueError:
            continue  # the turn that would describe the tools is gone
        encoded = encode(shorter)
        if encoded.turns_dropped:
            continue
        if any(weight for _, _, weight in encoded.spans):
            return shorter
        longest = longest or shorter
    return longest


def keep_newest(turns: Sequence[Turn], render: Render, encode: Encode) -> list[Message] | None:
    """Return the longest end of the conversation that fits, starts with a question and has an answer.

    The system message stays.
    """
    first = 1 if turns[0].role == "system" else 0

    def from_turn(start: int) -> list[Message]:
        return render([*turns[:first], *turns[start:]])

    starts = [index for index in range(first + 1, len(turns)) if is_question(turns[index])]
    # The later the start, the shorter the conversation.
    longest = bisect_left(starts, True, key=lambda start: not encode(from_turn(start)).turns_dropped)
    if longest == len(starts) or _has_answer(turns) > _has_answer(turns[starts[longest] :]):
        return None
    return from_turn(starts[longest])


def _has_answer(turns: Sequence[Turn]) -> bool:
    return any(turn.role == "assistant" for turn in turns)
