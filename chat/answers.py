"""How answers are written, and which of them a prompt leads to.

The families that think write an answer differently as the last one, behind the last question (a step between calls
of functions) and before it. So the prompt for an answer is not always what stands before it in the whole conversation,
and an answer that no prompt leads to could never be generated: it is not trained.
"""

from __future__ import annotations

from collections.abc import Sequence

from chat.families import THINK, THINK_END, Family, thought_block
from chat.turns import Turn


class Answers:
    """The answers of a conversation.

    Args:
        turns: all of it, the system turn included.
    """

    def __init__(self, turns: Sequence[Turn], family: Family) -> None:
        self._turns = turns
        self._family = family
        self._last = len(turns) - 1
        # Where nobody asks, no answer counts as behind a question.
        self._last_question = max((index for index, turn in enumerate(turns) if _is_question(turn)), default=self._last)
        self._texts: dict[tuple[int, bool, bool], str] = {}

    def written(self) -> list[Turn]:
        """The turns with the texts of answers as they are written."""
        return [
            turn._replace(content=self._final(index)) if turn.role == "assistant" else turn
            for index, turn in enumerate(self._turns)
        ]

    def asked_for(self) -> set[int]:
        """Indices of the answers whose rendered prompt is what stands before them in the rendered conversation."""
        asked: set[int] = set()
        is_behind_question = False
        is_same = True  # whether the answers since the last question, but for the one just before, are as in the prompt
        before: int | None = None
        for index, turn in enumerate(self._turns):
            if turn.role == "assistant" and is_same and self._follows(index, before, is_behind_question):
                asked.add(index)
            if before is not None:
                is_same = is_same and self._text(before, False, is_behind_question) == self._final(before)
            before = index if turn.role == "assistant" else None
            if _is_question(turn):
                # What stands before a question is written alike, whatever follows.
                is_behind_question = is_same = True
        return asked

    def _follows(self, index: int, before: int | None, is_behind_question: bool) -> bool:
        """Whether an answer starts as its prompt ends, and the one just before it is written as if it were the last."""
        if not self._final(index).startswith(self._family.prompt_suffix):
            return False
        if before is None:
            return True
        return self._family.continues_answers and self._text(before, True, is_behind_question) == self._final(before)

    def _final(self, index: int) -> str:
        return self._text(index, index == self._last, index > self._last_question)

    def _text(self, index: int, is_last: bool, is_behind_question: bool) -> str:
        place = (index, is_last, is_behind_question)
        if place not in self._texts:
            self._texts[place] = write_answer(self._turns[index], self._family, is_last, is_behind_question)
        return self._texts[place]


def write_answer(turn: Turn, family: Family, is_last: bool, is_behind_question: bool) -> str:
    """What stands between an answer's header and its end.

    Args:
        is_last: whether the conversation ends with it.
        is_behind_question: whether a question stands before it, and none behind it.
    """
    said = text = turn.content
    if family.thinking == "block":
        thought, said = split_thinking(turn)
        shows = is_behind_question and bool(is_last or thought)
        text = thought_block(thought) + said.lstrip("\n") if shows else said
    elif family.thinking == "all" or (family.thinking == "history" and not is_last):
        text = text.rpartition(THINK_END)[2].lstrip("\n")
    calls = family.tool_form.calls_text(turn.calls) if turn.calls and family.tool_form else ""
    return f"{text}\n{calls}" if calls and said else text + calls


def split_thinking(turn: Turn) -> tuple[str, str]:
    """The thinking and the words of an answer: out of its text only where it has no thinking of its own."""
    if turn.thinking is not None:
        return turn.thinking, turn.content
    before, found, _ = turn.content.partition(THINK_END)
    if not found:
        return "", turn.content
    thought = before.rstrip("\n").rpartition(THINK)[2].lstrip("\n")
    return thought, turn.content.rpartition(THINK_END)[2].lstrip("\n")


def _is_question(turn: Turn) -> bool:
    """Whether a user asks. Some hand the results of calls on as a user's words."""
    is_result = turn.content.startswith("<tool_response>") and turn.content.endswith("</tool_response>")
    return turn.role == "user" and not is_result
