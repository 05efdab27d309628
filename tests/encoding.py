"""Encoding in tests: as the data reader does it, and as Qwen v1's original script did."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from chat.families import QWEN_V1
from data_utils.encode import EncodedConversation, EncodeOptions, Encoder
from data_utils.schema import Conversation
from qwen_model.tokenization_qwen import QWenTokenizer


def check_and_encode(encoder: Encoder, conversation: Conversation) -> EncodedConversation:
    """Encode a conversation, or a plain text of one piece."""
    encoder.check_conversation(conversation)
    [encoded] = encoder.encode(conversation)
    return encoded


def weights_of(encoded: EncodedConversation) -> list[float]:
    """Return the loss weight of each of the T ids."""
    return [span.weight for span in encoded.spans for _ in range(span.length)]


def trained_of(encoded: EncodedConversation) -> list[bool]:
    """Return for each of the T ids whether it is trained."""
    return [weight > 0 for weight in weights_of(encoded)]


def trained_runs(encoded: EncodedConversation) -> list[list[int]]:
    """Return start and end of each run of trained ids."""
    runs: list[list[int]] = []
    for index, is_trained in enumerate(trained_of(encoded)):
        if is_trained and runs and runs[-1][1] == index:
            runs[-1][1] = index + 1
        elif is_trained:
            runs.append([index, index + 1])
    return runs


def without_weights(conversation: Conversation) -> Conversation:
    return replace(conversation, turns=tuple(turn._replace(weight=None) for turn in conversation.turns))


class OriginalEncoder(Encoder):
    """Encodes as Qwen v1's original script did, to compare with its recorded ids and labels.

    It reads control tokens in messages as control tokens, drops an answer that opens the conversation, cuts within
    answers, accepts conversations without an answer, and knows no weights of turns.
    """

    def __init__(self, tokenizer: QWenTokenizer, drops_opening: bool = True, **options: Any) -> None:
        reading_controls: Any = object.__new__(QWenTokenizer)
        reading_controls.__dict__.update(tokenizer.__dict__)  # copy() would build the vocabulary again
        reading_controls.encode_plain = lambda text: tokenizer.encode(text, allowed_special="all")
        defaults = {"label_mask": "qwen", "truncation": "cut", "needs_answer": False}
        super().__init__(reading_controls, QWEN_V1, EncodeOptions(**{**defaults, **options}))
        self.drops_opening = drops_opening

    def encode_conversation(self, conversation: Conversation) -> EncodedConversation:
        conversation = without_weights(conversation)
        if self.drops_opening and conversation.turns[0].role == "assistant":
            conversation = replace(conversation, turns=conversation.turns[1:])
        return super().encode_conversation(conversation)
