"""Differences between the chat formats of the Qwen families, as data.

Every family writes conversations as ChatML. They differ in the default system message, in which texts are tokenised
together, in the text before an answer, in what happens to thinking, and in how tools are written. ``chat.detect``
finds the family of a checkpoint. A format that is none of theirs is written by the checkpoint's template itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from chat.chatml import DEFAULT_SYSTEM, IM_END, IM_START
from chat.own_template import OwnTemplate
from chat.segments import ToolForm
from chat.tools_react import React

THINK = "<think>"
THINK_END = "</think>"


@dataclass(frozen=True)
class Family:
    """The chat format of one family.

    Attributes:
        name: for messages and the run's summary.
        default_system: system message of a conversation without one; ``None`` writes no system turn.
        joins_header: ``user\\n`` and the message are tokenised together, so that a message that starts with a newline
            merges with the header. Qwen v1 tokenises them apart. Every family tokenises an answer apart from its
            header, because at inference the model continues the ids of the header.
        prompt_suffix: text that the generation prompt adds after the assistant's header.
        thinking: what happens to the thinking of answers.
            ``none``: it is text like any other.
            ``block``: it is written before the answers after the last question (the last answer has a block even if it
            is empty) and removed from all others.
            ``blocks``: it is written before every answer after the last question, as an empty block if there is none,
            and removed from all others.
            ``kept``: it is written before every answer, as an empty block if there is none.
            ``stripped_from_history``: it is text; all answers except the last lose it, and their leading newlines.
            ``stripped``: it is removed from every answer.
        has_thinking_in_text: ``<think>...</think>`` in an answer's text is thinking, unless it has a field for that.
        knows_thinking: ``thinking`` matches the checkpoint's template; if not, thinking in the data is refused.
        prompts_opening_answer: the family has a prompt for an answer that opens the conversation. The later templates
            have none, so such an answer is not trained.
        prompts_after_answer: the generation prompt opens an answer even if the last turn is an answer.
        tool_form: how tools and calls are written; ``None`` if no known form matches.
        is_strict: every text and thought is written without the white space around it, and there is no prompt without a
            question of a user.
        instructions: text before the system message, or instead of it if there is none.
        writes_blank_system: a system message without text is an empty system turn; if not, there is none.
        role_names: the names of roles in headers, where they differ: pairs of role and name.
        trimmed_roles: roles whose texts are written without the white space around them; a strict family's are all.
        turn_end: white space behind the ``<|im_end|>`` of each message.
        own_template: writes the conversations; then nothing else of the format counts. ``None`` for ChatML.
    """

    name: str
    default_system: str | None = None
    joins_header: bool = True
    prompt_suffix: str = ""
    thinking: Literal["none", "block", "blocks", "kept", "stripped_from_history", "stripped"] = "none"
    has_thinking_in_text: bool = True
    knows_thinking: bool = True
    prompts_opening_answer: bool = False
    prompts_after_answer: bool = True
    tool_form: ToolForm | None = None
    is_strict: bool = False
    instructions: str = ""
    writes_blank_system: bool = True
    role_names: tuple[tuple[str, str], ...] = ()
    trimmed_roles: tuple[str, ...] = ()
    turn_end: str = "\n"
    own_template: OwnTemplate | None = None

    def header(self, role: str) -> str:
        """Return the name of a role in the header of its messages, and the end of the line."""
        return f"{dict(self.role_names).get(role, role)}\n" if self.role_names else f"{role}\n"

    def is_trimmed(self, role: str) -> bool:
        """Return whether texts of a role are written without the white space around them."""
        return self.is_strict or role in self.trimmed_roles

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """The control tokens of conversations."""
        return (IM_START, IM_END) if self.own_template is None else self.own_template.used_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        """Tokens that end an answer, beside ChatML's."""
        return () if self.own_template is None else (self.own_template.stop,)

    @property
    def placed_tokens(self) -> tuple[str, ...]:
        """All tokens that rendering can place."""
        return (IM_START, IM_END) if self.own_template is None else self.own_template.tokens

    @property
    def has_thinking(self) -> bool:
        """Return whether thinking is treated differently from other text."""
        return self.thinking != "none"

    @property
    def has_thinking_field(self) -> bool:
        """Return whether the chat template reads thinking from a field of its own."""
        return self.thinking in ("block", "blocks", "kept")


QWEN_V1 = Family(
    "qwen", default_system=DEFAULT_SYSTEM, joins_header=False, prompts_opening_answer=True, tool_form=React()
)


def thought_block(thought: str) -> str:
    """Return the text that precedes an answer with thinking."""
    text = thought.strip("\n")
    return f"{THINK}\n{text}\n{THINK_END}\n\n"


EMPTY_THOUGHT = thought_block("")

ANSWER_STYLES = (
    Family("chatml"),  # Qwen1.5, Qwen2, Qwen2.5, QwQ-32B-Preview, Qwen3-Instruct-2507
    Family("chatml-launch", prompts_after_answer=False),  # Qwen1.5 as published in February 2024
    Family("chatml-hybrid", thinking="block"),  # Qwen3
    Family("chatml-thinking", thinking="block", prompt_suffix=f"{THINK}\n"),  # Qwen3-Thinking-2507
    Family("chatml-qwq", thinking="stripped_from_history", prompt_suffix=f"{THINK}\n"),  # QwQ-32B
    Family("chatml-qwq-launch", thinking="stripped", prompt_suffix=f"{THINK}\n"),
    Family("chatml-hybrid", thinking="block", prompt_suffix=EMPTY_THOUGHT),  # Qwen3 with enable_thinking=False
)

# Prompts for an answer with thinking and without it; answers before the last question without and with thinking.
STRICT_STYLES = tuple(
    replace(style, thinking=thinking, prompt_suffix=suffix)
    for style in (
        Family("chatml-3.5", thinking="blocks", is_strict=True),  # Qwen3.5 and Qwen3.6
        Family(  # Qwen3.8
            "chatml-3.8", thinking="kept", has_thinking_in_text=False, is_strict=True, writes_blank_system=False
        ),
    )
    for thinking in ("blocks", "kept")
    for suffix in (f"{THINK}\n", EMPTY_THOUGHT)
)
