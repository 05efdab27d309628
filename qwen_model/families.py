"""What differs between the families of Qwen chat models, as data.

A plain conversation (no tools, no thinking) is ChatML in every family; they differ in the default system message, in
how text is cut into pieces before it is tokenised, and in what stands before an answer. Which of them a checkpoint
belongs to is found in ``templates.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"

DEFAULT_SYSTEM = "You are a helpful assistant."


class Turn(NamedTuple):
    """One message: ``role`` is ``system``, ``user`` or ``assistant``."""

    role: str
    content: str


@dataclass(frozen=True)
class Family:
    """How one family writes a plain conversation.

    Attributes:
        name: for messages and the run's record.
        default_system: system message of a conversation that brings none; ``None`` writes no system turn.
        joins_header: whether ``user\\n`` and the message are tokenised in one piece. Qwen v1 cuts between them; later
            tokenizers see the whole text, so that a message starting with a newline melts into the header. An answer
            is always cut off its header: at inference the model continues the header's own ids.
        opens_last_answer: text that the template writes before a final answer that has no thinking.
        prompt_suffix: text that the generation prompt adds after the assistant's header.
        strips_answers: which answers lose their leading newlines.
        has_thinking: whether ``<think>`` is a control word of the family.
        trains_opening: whether an answer that opens the conversation, before any message, is trained. The later
            templates cannot write a prompt for it.
        continues_answers: whether the generation prompt opens an answer after an answer.
    """

    name: str
    default_system: str | None = None
    joins_header: bool = True
    opens_last_answer: str = ""
    prompt_suffix: str = ""
    strips_answers: Literal["none", "opened", "history", "all"] = "none"
    has_thinking: bool = False
    trains_opening: bool = False
    continues_answers: bool = True


QWEN_V1 = Family("qwen", default_system=DEFAULT_SYSTEM, joins_header=False, trains_opening=True)

EMPTY_THOUGHT = "<think>\n\n</think>\n\n"

ANSWER_STYLES = (
    Family("chatml"),  # Qwen1.5, Qwen2, Qwen2.5, QwQ-32B-Preview, Qwen3-Instruct-2507
    Family("chatml-launch", continues_answers=False),  # Qwen1.5 as published in February 2024
    Family("chatml-hybrid", opens_last_answer=EMPTY_THOUGHT, strips_answers="opened", has_thinking=True),  # Qwen3
    Family(  # Qwen3-Thinking-2507
        "chatml-thinking",
        opens_last_answer=EMPTY_THOUGHT,
        prompt_suffix="<think>\n",
        strips_answers="opened",
        has_thinking=True,
    ),
    Family("chatml-qwq", prompt_suffix="<think>\n", strips_answers="history", has_thinking=True),  # QwQ-32B
    Family("chatml-qwq-launch", prompt_suffix="<think>\n", strips_answers="all", has_thinking=True),
)
