"""Division of a conversation into samples, and the prompt, with thinking or without, that each is trained behind.

A sample is a whole conversation, or one answer with the prompt that leads to it. Most templates write an answer in the
middle of a conversation otherwise than the model has to generate it: without its thinking, or without an empty block of
it. Then the whole conversation trains such an answer wrongly or not at all, and a sample of its own trains it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from chat.answers import Answers, has_thinking, move_thinking, without_thinking
from chat.families import THINK, Family
from chat.label_mask import LabelMask
from chat.render import trimmed
from chat.turns import Turn

Thinking = Literal["auto", "on", "off", "mixed"]
SplitTurns = Literal["auto", "always", "never"]


class Sample(NamedTuple):
    """A sample of a conversation.

    Attributes:
        thinks: whether its prompt asks for thinking.
        end: number of the turns up to its last one.
        trained_from: number of the first turns that earlier samples train; ``None``: it is the whole conversation.
    """

    thinks: bool
    end: int
    trained_from: int | None = None


@dataclass(frozen=True)
class SampleRules:
    """How the conversations of a run become samples.

    Attributes:
        family: the chat format behind prompts that ask for thinking.
        plain: behind prompts that ask for none; the same if the checkpoint has no such switch.
        thinking: ``on`` and ``off`` take one of these prompts, and ``off`` removes all thinking; ``auto`` and ``mixed``
            take for each answer the prompt that fits it.
        split_turns: ``always`` makes a sample of each answer that is to be trained; ``auto`` only in conversations that
            would not train each of them as it has to be generated; ``never`` trains whole conversations.
    """

    family: Family
    plain: Family
    thinking: Thinking = "on"
    split_turns: SplitTurns = "never"
    label_mask: LabelMask = "assistant"

    @cached_property
    def has_switch(self) -> bool:
        """Return whether prompts with and without thinking differ."""
        return self.family != self.plain

    @cached_property
    def always_thinks(self) -> bool:
        """Return whether every answer has to begin with thinking."""
        return not self.has_switch and opens_thinking(self.family) and self.family.thinking != "stripped"

    @cached_property
    def is_trivial(self) -> bool:
        """Return whether every conversation is read as it is, and is one sample."""
        if self.thinking == "off" or self.split_turns == "always" or not self.family.has_thinking_in_text:
            return False
        return not self.family.has_thinking or (self.split_turns == "never" and self.thinking == "on")

    def family_of(self, sample: Sample) -> Family:
        """Return the chat format of a sample."""
        return self.family if sample.thinks else self.plain

    def read(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        """Return the turns as they are rendered: thinking removed or in its field, answers that lack it not trained."""
        change = without_thinking if self.thinking == "off" else move_thinking
        if self.thinking == "off" or not self.family.has_thinking_in_text:
            turns = tuple(map(change, turns))
        if self._chooses and self.always_thinks and self.label_mask != "all":
            turns = tuple(
                turn._replace(weight=0.0)
                if turn.role == "assistant" and turn.weight is None and not has_thinking(turn, self.family)
                else turn
                for turn in turns
            )
        return turns

    def lacks_thinking(self, turns: Sequence[Turn]) -> bool:
        """Return whether answers are to be trained, all without the thinking that every answer has to begin with.

        Thinking of an answer with the weight 0 shows that the conversation has not lost it.
        """
        if not self._chooses or not self.always_thinks or self.label_mask == "all":
            return False
        if any(turn.role == "assistant" and turn.weight == 0 and has_thinking(turn, self.family) for turn in turns):
            return False
        return bool(self._wanted(turns)) and not self._wanted(self.read(turns))

    def plan(self, turns: Sequence[Turn]) -> list[Sample]:
        """Return the samples of a conversation, at least one.

        Args:
            turns: after ``read``.
        """
        wanted = self._wanted(turns)
        modes = {index: self._thinks(turns[index]) for index in wanted}
        if not self._divides(turns, modes):
            return [Sample(modes[wanted[-1]] if wanted else self.thinking != "off", len(turns))]
        samples: list[Sample] = []
        start = 0
        for index in wanted:
            samples.append(Sample(modes[index], index + 1, start))
            start = index + 1
        return samples

    @property
    def _chooses(self) -> bool:
        return self.thinking in ("auto", "mixed")

    def _thinks(self, turn: Turn) -> bool:
        """Return whether the prompt for an answer asks for thinking."""
        if not self._chooses or not self.has_switch:
            return self.thinking != "off"
        return has_thinking(turn, self.family)

    def _wanted(self, turns: Sequence[Turn]) -> list[int]:
        """Return the indices of the answers that are to be trained if there is a prompt for them."""
        answers = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
        masked = answers[-1:] if self.label_mask == "last" else answers
        return [index for index in answers if (index in masked if (own := turns[index].weight) is None else own)]

    def _divides(self, turns: Sequence[Turn], modes: dict[int, bool]) -> bool:
        """Return whether each answer gets a sample of its own.

        Args:
            modes: the answers that are to be trained, and whether the prompt for each asks for thinking.
        """
        if not modes or self.split_turns == "never":
            return False
        if self.split_turns == "always":
            return True
        if self.label_mask == "all" or not self.family.has_thinking:
            return False  # every answer is trained as it stands in the whole conversation
        if len(set(modes.values())) > 1:
            return True
        family = self.family if any(modes.values()) else self.plain
        complete = list(map(trimmed, turns)) if family.is_strict else turns
        own, whole = Answers(complete, family).in_samples(turns[0].role == "system")
        return bool(own & modes.keys() - whole)


def opens_thinking(family: Family) -> bool:
    """Return whether a family's prompt begins the thinking of an answer."""
    return family.prompt_suffix == f"{THINK}\n"
