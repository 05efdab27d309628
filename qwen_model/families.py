"""What differs between the families of Qwen chat models, as data.

A plain conversation (no tools, no thinking) is ChatML in every family; they differ in the default system message, in
how text is cut into pieces before it is tokenised, and in what stands before an answer. Qwen v1 is fixed. A later
checkpoint carries a chat template: its default system message is read off that template and its answer style is the one
of ``ANSWER_STYLES`` that renders the same text, so that what is trained is what the checkpoint's own template writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from errors import ConfigError

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

# Each pair of styles renders at least one of these differently.
_PROBES: tuple[tuple[Turn, ...], ...] = (
    (Turn("system", "s"), Turn("user", "u"), Turn("assistant", "a")),
    (Turn("user", "\nu"), Turn("assistant", "\n\na\n"), Turn("user", "v"), Turn("assistant", "\nb")),
    (Turn("user", "u"), Turn("assistant", "\na"), Turn("assistant", "b")),
)

ApplyTemplate = Callable[[Sequence[dict[str, str]], bool], str]


def family_of(model_type: str, tokenizer: Any) -> Family:
    """The family of a checkpoint, from its config's ``model_type`` and its tokenizer's chat template.

    Raises:
        ConfigError: an unknown ``model_type``, or a chat template that writes plain conversations in no known way.
    """
    if model_type == "qwen":
        return QWEN_V1
    if model_type not in ("qwen2", "qwen3"):
        raise ConfigError(
            f"config.json: model_type {model_type!r} is not supported",
            "Use a checkpoint of model_type qwen, qwen2 or qwen3",
        )
    if not getattr(tokenizer, "chat_template", None):
        # Base checkpoints without a template: what the first instruct models of the model_type do.
        return replace(ANSWER_STYLES[0], default_system=DEFAULT_SYSTEM if model_type == "qwen2" else None)

    def apply(messages: Sequence[dict[str, str]], prompt: bool) -> str:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt))

    return match_template(apply)


def match_template(apply: ApplyTemplate) -> Family:
    """The answer style and default system message with which our rendering equals a chat template's.

    Args:
        apply: renders messages (dicts of role and content), with or without the generation prompt, to text.

    Raises:
        ConfigError: no known style renders the probes as the template does.
    """
    from qwen_model.chatml import render, render_prompt, text_of

    default_system = _default_system(apply)
    for style in ANSWER_STYLES:
        family = replace(style, default_system=default_system)
        same = all(
            _closed(apply(_messages(probe), False)) == text_of(render(probe, family))
            and apply(_messages(probe[:-1]), True) == text_of(render_prompt(probe[:-1], family))
            for probe in _PROBES
        )
        if same:
            return family
    raise ConfigError(
        "tokenizer_config.json: the checkpoint's chat template does not write plain conversations as any known Qwen "
        "template does",
        "Restore the official chat template of the checkpoint",
    )


def _default_system(apply: ApplyTemplate) -> str | None:
    before, _, _ = apply([{"role": "user", "content": "u"}], True).partition(f"{IM_START}user\nu")
    opening, closing = f"{IM_START}system\n", f"{IM_END}\n"
    if before.startswith(opening) and before.endswith(closing):
        return before[len(opening) : -len(closing)]
    return None


def _messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def _closed(text: str) -> str:
    """The template of Qwen1.5's launch leaves the last message open; a training text is always closed."""
    return text if text.endswith(f"{IM_END}\n") else f"{text}{IM_END}\n"
