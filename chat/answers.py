"""Text of the answers of a conversation, and which of them have an inference prompt.

Reasoning models write an answer differently depending on whether it ends the conversation and whether a later question
exists. So the inference prompt for an answer is not always what precedes it in the rendered conversation. An answer
without a prompt that leads to it could never be generated, and is not trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from chat.families import THINK, THINK_END, Family, thought_block
from chat.turns import Turn


class Answers:
    """The answers of a conversation as a family writes them.

    Args:
        turns: the whole conversation, including its system turn.
    """

    def __init__(self, turns: Sequence[Turn], family: Family) -> None:
        self._turns = turns
        self._family = family
        self._last = len(turns) - 1
        # Without a question, no answer counts as being after the last one.
        self._last_question = max((index for index, turn in enumerate(turns) if is_question(turn)), default=self._last)
        self._texts: dict[tuple[int, bool, bool], str] = {}

    def written_turns(self) -> list[Turn]:
        """Return the turns, with the content of answers replaced by their rendered text."""
        turns = list(self._turns)
        for index, turn in enumerate(turns):
            if turn.role == "assistant" and (text := self._rendered(index)) != turn.content:
                turns[index] = turn._replace(content=text)
        return turns

    def loses_thinking(self) -> bool:
        """Return whether the family writes an answer without the thinking that it has."""
        return any(
            _is_lost(split_thinking(turn, self._family)[0].strip(), self._rendered(index))
            for index, turn in enumerate(self._turns)
            if turn.role == "assistant"
        )

    def promptable(self, has_own_system: bool) -> set[int]:
        """Return the indices of answers that the model can be prompted for.

        Their inference prompt equals what precedes them in the rendered conversation.

        Args:
            has_own_system: the system turn is part of the data, not added by rendering.
        """
        return {index for index, is_prefix, _ in self._prompted(has_own_system) if is_prefix}

    def in_samples(self, has_own_system: bool) -> tuple[set[int], set[int]]:
        """Return the indices of answers that a sample of their own can train, and of those that need none.

        A sample of its own writes an answer as the last one, behind its inference prompt. An answer needs none if the
        whole conversation trains it with the same text.

        Args:
            has_own_system: as in ``promptable``.
        """
        own: set[int] = set()
        whole: set[int] = set()
        for index, is_prefix, after_question in self._prompted(has_own_system):
            text = self._text(index, True, after_question)
            if not text.startswith(self._family.prompt_suffix):
                continue
            own.add(index)
            if is_prefix and text == self._rendered(index):
                whole.add(index)
        return own, whole

    def _prompted(self, has_own_system: bool) -> Iterator[tuple[int, bool, bool]]:
        """Yield each answer that has an inference prompt: its index, whether the prompt is what precedes it and
        opens it in the rendered conversation, and whether a question precedes it."""
        family = self._family
        opening = 1 if self._turns and self._turns[0].role == "system" else 0
        after_question = False
        is_history_same = True  # answers since the last question, except for the previous turn, are as in the prompt
        previous: int | None = None  # the previous turn, if it is an answer
        for index, turn in enumerate(self._turns):
            has_prompt = after_question or not family.is_strict
            if index == opening and not has_own_system and not family.prompts_opening_answer:
                has_prompt = False
            if turn.role == "assistant" and has_prompt and (previous is None or family.prompts_after_answer):
                is_prefix = is_history_same and self._follows_prompt(index, previous, after_question)
                yield index, is_prefix, after_question
            if previous is not None:
                in_prompt = self._text(previous, False, after_question)
                is_history_same = is_history_same and in_prompt == self._rendered(previous)
            previous = index if turn.role == "assistant" else None
            if is_question(turn):
                # What precedes a question is written the same whatever follows.
                after_question = is_history_same = True

    def _follows_prompt(self, index: int, previous: int | None, after_question: bool) -> bool:
        """Check that an answer starts as its prompt ends, and that an answer before it is written as a last one."""
        if not self._rendered(index).startswith(self._family.prompt_suffix):
            return False
        return previous is None or self._text(previous, True, after_question) == self._rendered(previous)

    def _rendered(self, index: int) -> str:
        return self._text(index, index == self._last, index > self._last_question)

    def _text(self, index: int, is_last: bool, after_last_question: bool) -> str:
        key = (index, is_last, after_last_question)
        if key not in self._texts:
            self._texts[key] = write_answer(self._turns[index], self._family, is_last, after_last_question)
        return self._texts[key]


def write_answer(turn: Turn, family: Family, is_last: bool, after_last_question: bool) -> str:
    """Return the text between an answer's header and its end.

    Args:
        is_last: the conversation ends with it.
        after_last_question: a question precedes it, and none follows.
    """
    if family.has_thinking_field:
        thought, answer = split_thinking(turn, family)
        if family.thinking == "block":
            shows_thought = after_last_question and bool(is_last or thought)
        else:
            shows_thought = after_last_question or family.thinking == "kept"
        text = thought_block(thought) + answer.lstrip("\n") if shows_thought else answer
    elif family.thinking == "none":
        text = answer = turn.content
    else:
        # The templates of these families know thinking only as part of an answer's text.
        text = answer = thought_block(turn.thinking) + turn.content if turn.thinking else turn.content
        if family.thinking == "stripped" or not is_last:
            text = text.rpartition(THINK_END)[2].lstrip("\n")
    calls = family.tool_form.calls_text(turn.calls) if turn.calls and family.tool_form else ""
    separator = family.tool_form.separator if calls and answer and family.tool_form else ""
    return f"{text}{separator}{calls}"


def split_thinking(turn: Turn, family: Family) -> tuple[str, str]:
    """Split an answer into its thinking and the rest. If ``turn.thinking`` is set, the text is not searched."""
    if turn.thinking is not None or not family.has_thinking_in_text:
        return turn.thinking or "", turn.content
    thought, answer = _split_text(turn.content)
    return thought.strip() if family.is_strict else thought, answer


def has_thinking(turn: Turn, family: Family) -> bool:
    """Return whether an answer brings thinking that a family knows as such."""
    return bool(split_thinking(turn, family)[0].strip())


def without_thinking(turn: Turn) -> Turn:
    """Return an answer without its thinking, in its text and in its field."""
    if turn.role != "assistant" or not (turn.thinking or (turn.thinking is None and THINK_END in turn.content)):
        return turn
    return turn._replace(content=turn.content if turn.thinking else _split_text(turn.content)[1], thinking="")


def move_thinking(turn: Turn) -> Turn:
    """Return a turn with the thinking in its text moved to the field, for families that know only that."""
    if turn.role != "assistant" or turn.thinking is not None or THINK_END not in turn.content:
        return turn
    thought, answer = _split_text(turn.content)
    return turn._replace(content=answer, thinking=thought)


def _split_text(text: str) -> tuple[str, str]:
    before, end_tag, _ = text.partition(THINK_END)
    if not end_tag:
        return "", text
    thought = before.rstrip("\n").rpartition(THINK)[2].lstrip("\n")
    return thought, text.rpartition(THINK_END)[2].lstrip("\n")


def _is_lost(thought: str, written: str) -> bool:
    before, end_tag, _ = written.rpartition(THINK_END)
    return bool(thought) and not (end_tag and thought in before)


def is_question(turn: Turn) -> bool:
    """Return whether a user asks something. Some data writes tool results as user turns."""
    is_result = turn.content.startswith("<tool_response>") and turn.content.endswith("</tool_response>")
    return turn.role == "user" and not is_result
