"""Which family a checkpoint belongs to.

Qwen v1 is fixed. A later checkpoint carries a chat template: its default system message is read off that template, and
its answer style is the one of ``families.ANSWER_STYLES`` that renders the same text, so that what is trained is what
the checkpoint's own template writes. Names decide nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from errors import ConfigError
from qwen_model.chatml import render, render_prompt, text_of
from qwen_model.families import ANSWER_STYLES, DEFAULT_SYSTEM, IM_END, IM_START, QWEN_V1, Family, Turn

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
