"""What differs between the families of Qwen chat models, as data.

A conversation is ChatML in every family; they differ in the default system message, in how text is cut into pieces
before it is tokenised, in what stands before an answer, in what becomes of its thinking, and in how tools are written.
Which of them a checkpoint belongs to is found in ``templates.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from chat.tools_react import React
from chat.turns import ToolForm

IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"
THINK = "<think>"
THINK_END = "</think>"

DEFAULT_SYSTEM = "You are a helpful assistant."


@dataclass(frozen=True)
class Family:
    """How one family writes a conversation.

    Attributes:
        name: for messages and the run's record.
        default_system: system message of a conversation that brings none; ``None`` writes no system turn.
        joins_header: whether ``user\\n`` and the message are tokenised in one piece. Qwen v1 cuts between them; later
            tokenizers see the whole text, so that a message starting with a newline melts into the header. An answer
            is always cut off its header: at inference the model continues the header's own ids.
        prompt_suffix: text that the generation prompt adds after the assistant's header.
        thinking: what becomes of thoughts. ``none``: they are text like any other. ``block``: they are written before
            the answers behind the last question, also an empty one before the very last answer, and are cut off the
            others. ``history``: they are text, but all answers except for the last lose them, and their leading
            newlines. ``all``: every answer loses them.
        knows_thinking: whether ``thinking`` is what the checkpoint's template does; else only answers without are read.
        trains_opening: whether an answer that opens the conversation, before any message, is trained. The later
            templates cannot write a prompt for it.
        continues_answers: whether the generation prompt opens an answer after an answer.
        tool_form: how tools and their calls are written; ``None`` where that is not known here.
    """

    name: str
    default_system: str | None = None
    joins_header: bool = True
    prompt_suffix: str = ""
    thinking: Literal["none", "block", "history", "all"] = "none"
    knows_thinking: bool = True
    trains_opening: bool = False
    continues_answers: bool = True
    tool_form: ToolForm | None = None

    @property
    def has_thinking(self) -> bool:
        """Whether thoughts are more than text like any other."""
        return self.thinking != "none"


QWEN_V1 = Family("qwen", default_system=DEFAULT_SYSTEM, joins_header=False, trains_opening=True, tool_form=React())


def thought_block(thought: str) -> str:
    """What stands before an answer that was thought about."""
    text = thought.strip("\n")
    return f"{THINK}\n{text}\n{THINK_END}\n\n"


EMPTY_THOUGHT = thought_block("")

ANSWER_STYLES = (
    Family("chatml"),  # Qwen1.5, Qwen2, Qwen2.5, QwQ-32B-Preview, Qwen3-Instruct-2507
    Family("chatml-launch", continues_answers=False),  # Qwen1.5 as published in February 2024
    Family("chatml-hybrid", thinking="block"),  # Qwen3
    Family("chatml-thinking", thinking="block", prompt_suffix=f"{THINK}\n"),  # Qwen3-Thinking-2507
    Family("chatml-qwq", thinking="history", prompt_suffix=f"{THINK}\n"),  # QwQ-32B
    Family("chatml-qwq-launch", thinking="all", prompt_suffix=f"{THINK}\n"),
)
