"""Conversations to token ids and labels, and what happens to one that is too long.

How a turn is written and what of it is trained is ``qwen_model.chatml``'s business; here its segments become numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypedDict

from data_utils.schema import Conversation
from errors import DataError
from qwen_model.chatml import IGNORE_INDEX, LabelMask, control_ids_of, encode_turn, plain_encoder, render
from qwen_model.families import QWEN_V1, Family, Turn

# Headers, line ends and system messages come back in every sample; so do the turns of a sample that is rendered again.
_CACHED_TEXTS = 256


class Example(TypedDict):
    """One sample: ids, and in the same places the id where it is to be learnt, ``IGNORE_INDEX`` elsewhere. No shift."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class EncodeOptions:
    """How conversations are encoded.

    Attributes:
        max_length: most tokens of a sample.
        system_message: for conversations that bring none; ``None`` takes the family's default.
        label_mask: ``assistant`` trains each answer and its ``<|im_end|>\\n``, ``qwen`` what the original did.
        truncation: ``turns`` drops whole turns from the end until the rest fits, ``cut`` cuts at ``max_length`` as the
            original did, also inside of an answer.
        allow_special: read control tokens in the text of messages as such. Only to compare with the original (Qwen v1).
        drop_leading: drop an answer that opens the conversation, as the original did.
        needs_answer: whether a conversation without an assistant turn is an error.
    """

    max_length: int = 8192
    system_message: str | None = None
    label_mask: LabelMask = "assistant"
    truncation: Literal["turns", "cut"] = "turns"
    allow_special: bool = False
    drop_leading: bool = False
    needs_answer: bool = True


ORIGINAL = EncodeOptions(label_mask="qwen", truncation="cut", allow_special=True, drop_leading=True, needs_answer=False)
"""What the original Qwen v1 script did, at its default length: the base for comparing with it."""


@dataclass(frozen=True)
class EncodedConversation:
    """A conversation as numbers.

    Attributes:
        input_ids: T ids, at most ``max_length``; none when not even the turns up to the first answer fit.
        trained: for each id whether it is to be learnt.
        turns_dropped: rendered turns that are missing, or with ``truncation="cut"`` not whole.
    """

    input_ids: list[int]
    trained: list[bool]
    turns_dropped: int = 0

    @property
    def labels(self) -> list[int]:
        """T labels, as in ``Example``."""
        return [id_ if trained else IGNORE_INDEX for id_, trained in zip(self.input_ids, self.trained, strict=True)]

    @property
    def trained_tokens(self) -> int:
        """How many ids are learnt. The first id of a sample is never predicted, whatever its label."""
        return sum(self.trained[1:])


class Encoder:
    """Encodes the conversations of a run: one tokenizer, one family, one set of options.

    Args:
        tokenizer: a ``QWenTokenizer`` or a fast tokenizer of the later families.
        family: from ``qwen_model.templates.family_of``.
    """

    def __init__(self, tokenizer: Any, family: Family, options: EncodeOptions) -> None:
        encode_text = plain_encoder(tokenizer)
        if options.allow_special:
            assert family == QWEN_V1, "control tokens in messages are only ever read as such to compare with Qwen v1"

            def encode_text(text: str) -> list[int]:
                ids: list[int] = tokenizer.encode(text, allowed_special="all")
                return ids

        self.family = family
        self.options = options
        self._encode_text = lru_cache(maxsize=_CACHED_TEXTS)(encode_text)
        self._control_ids = control_ids_of(tokenizer)

    def encode_conversation(self, conversation: Conversation) -> EncodedConversation:
        """Ids and labels of a conversation, shortened to ``max_length`` where it must be.

        With ``truncation="turns"`` what remains is the longest run of whole turns from the start that fits and holds an
        answer, rendered as a conversation of its own: some families write the last answer differently.

        Raises:
            DataError: no assistant turn, or thinking in a family that has it.
        """
        turns = self._turns_of(conversation)
        ids, trained, whole, total = self._encode(turns)
        if whole < total and self.options.truncation == "cut":
            ids, trained = ids[: self.options.max_length], trained[: self.options.max_length]
        elif whole < total:
            ids, trained, whole = self._encode_fitting(turns, whole, total)
        return EncodedConversation(ids, trained, turns_dropped=total - whole)

    def _turns_of(self, conversation: Conversation) -> Sequence[Turn]:
        turns = conversation.turns
        if self.options.drop_leading and turns[0].role == "assistant":
            turns = turns[1:]
        if self.options.needs_answer and all(turn.role != "assistant" for turn in turns):
            raise DataError(
                conversation.where, "the conversation has no assistant turn", "Give it an answer, or remove the record"
            )
        if self.family.has_thinking:
            for number, turn in enumerate(conversation.turns, 1):
                if turn.role == "assistant" and ("<think>" in turn.content or "</think>" in turn.content):
                    raise DataError(
                        conversation.where,
                        f"turn {number} holds <think> or </think>: thinking is not supported yet",
                        "Remove the thinking from the answer, or leave the record out",
                    )
        return turns

    def _encode(self, turns: Sequence[Turn]) -> tuple[list[int], list[bool], int, int]:
        """Ids, mask, how many rendered turns lie within ``max_length``, and how many there are. Stops beyond it."""
        rendered = render(turns, self.family, self.options.system_message, self.options.label_mask)
        ids: list[int] = []
        trained: list[bool] = []
        for index, turn in enumerate(rendered):
            turn_ids, turn_trained = encode_turn(turn, self._encode_text, self._control_ids)
            ids += turn_ids
            trained += turn_trained
            if len(ids) > self.options.max_length:
                return ids, trained, index, len(rendered)
        return ids, trained, len(rendered), len(rendered)

    def _encode_fitting(self, turns: Sequence[Turn], whole: int, total: int) -> tuple[list[int], list[bool], int]:
        """Ids and mask of the longest start of ``turns`` that fits and holds an answer, and its rendered turns.

        A turn is longer or shorter as the last one than in between, so the first turn that did not fit may do so as
        the last one, and those that did may not.
        """
        added = total - len(turns)
        first_answer = next((index for index, turn in enumerate(turns) if turn.role == "assistant"), 0)
        for kept in range(min(whole + 1, total - 1) - added, first_answer, -1):
            ids, trained, fitting, rendered = self._encode(turns[:kept])
            if fitting == rendered:
                return ids, trained, rendered
        return [], [], 0
