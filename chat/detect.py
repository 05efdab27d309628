"""Detection of a checkpoint's family.

Checkpoints later than Qwen v1 have a chat template. Short conversations (probes) are rendered with it and with each
known answer style and tool form, and those that give the same text are used. So training writes what the checkpoint's
own template writes. Path names and model names are never used. A template is code of the checkpoint, so the probes are
rendered in a process with limits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from chat.chatml import IM_END, IM_START
from chat.families import ANSWER_STYLES, STRICT_STYLES, Family
from chat.limited import LimitExceeded, run_limited
from chat.render import render, render_prompt, text_of
from chat.tools_hermes import HERMES_FORMS
from chat.tools_xml import XML_FORMS
from chat.turns import Tool, ToolCall, Turn
from errors import ConfigError

Probe = tuple[Turn, ...]

_ASK, _ANSWER = Turn("user", "u"), Turn("assistant", "b")
# Any two answer styles render at least one of these differently.
_PROBES: tuple[Probe, ...] = (
    (Turn("system", "s"), _ASK, _ANSWER),
    (Turn("user", "\nu"), Turn("assistant", "\n\na\n"), _ASK, Turn("assistant", "\nb")),
    (_ASK, Turn("assistant", "\na"), _ANSWER),
    (Turn("system", " "), _ASK, _ANSWER),
)

_TOOLS: tuple[Tool, ...] = ({"type": "function", "function": {"name": "é", "parameters": {"b": [1.0], "a": {}}}}, {})
_CALL = ToolCall("f", {"é": [True, "<"], "a": 1e-07, "b": True, "c": " 1"})
_RESULT = Turn("tool", "\nr")
_CALLING = Turn("assistant", "", (_CALL,))
_TOOL_PROBES: tuple[Probe, ...] = (
    (Turn("system", "s"), _ASK, Turn("assistant", "a\n", (_CALL, ToolCall("g", {}))), _RESULT, _RESULT, _ANSWER),
    (_ASK, _CALLING, _RESULT, _ANSWER, _ASK, _CALLING._replace(content="a")),
)
_STRING_ARGUMENTS_PROBE: Probe = (_ASK, Turn("assistant", "", (ToolCall("f", '{"a" :1}'),)), _RESULT, _ANSWER)

_THOUGHT = Turn("assistant", "a", thinking="\nt\n")
_THINKING_PROBES: tuple[Probe, ...] = (
    (_ASK, Turn("assistant", "<think>\nt\n</think>\n\na"), _ASK, Turn("assistant", "t</think>b")),
    (_ASK, _THOUGHT, _THOUGHT, _ASK, _THOUGHT, _THOUGHT),
)
_STEP = _THOUGHT._replace(calls=(_CALL,))
_STEPS_PROBE: Probe = (_ASK, _STEP, _RESULT, _STEP, _RESULT, _THOUGHT, _ASK, _STEP._replace(content=""), _RESULT, _STEP)

_MOST_TEXT = 1_000_000  # characters of a rendered probe


class TemplateFailure(ConfigError):
    """A chat template that fails, or takes too much time, memory or text.

    Attributes:
        reason: what it does.
    """

    def __init__(self, place: Path, reason: str) -> None:
        super().__init__(f"{place}: the chat template {reason}", "Restore the official chat template of the checkpoint")
        self.reason = reason


ApplyTemplate = Callable[[Sequence[dict[str, Any]], Sequence[Tool], bool], str]


def family_of(tokenizer: Any, base_system: str | None = None, **template_kwargs: Any) -> Family:
    """Return the family of a checkpoint later than Qwen v1, from its tokenizer's chat template.

    Args:
        base_system: default system message of a base checkpoint, which has no template.
        template_kwargs: arguments of the template, such as ``enable_thinking=False``: the family is of prompts and
            texts with them.

    Raises:
        ConfigError: a chat template that writes plain conversations in an unknown way, fails, or takes too much time,
            memory or text.
    """
    if not getattr(tokenizer, "chat_template", None):
        # As the first instruct models of the same model_type.
        return replace(ANSWER_STYLES[0], default_system=base_system)

    def apply(messages: Sequence[dict[str, Any]], tools: Sequence[Tool], prompt: bool) -> str:
        text = str(
            tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=prompt,
                **template_kwargs,
            )
        )
        if len(text) > _MOST_TEXT:
            raise LimitExceeded(f"writes more than {_MOST_TEXT:,} characters for a conversation of a few words")
        return text

    try:
        return run_limited(lambda: match_template(apply))
    except LimitExceeded as error:
        raise TemplateFailure(_template_file(str(getattr(tokenizer, "name_or_path", ""))), str(error)) from None


def _template_file(folder: str) -> Path:
    file = Path(folder, "chat_template.jinja")
    return file if file.is_file() else Path(folder, "tokenizer_config.json")


def match_template(apply: ApplyTemplate) -> Family:
    """Return the family whose rendering equals that of a chat template.

    If no tool form matches, the family has none; if thinking does not match, ``knows_thinking`` is false.

    Args:
        apply: renders messages (OpenAI's dicts) and tools to text, with or without the generation prompt.

    Raises:
        ConfigError: no known answer style renders plain conversations as the template does.
    """
    system, found = _default_system(apply), []
    for style in (*ANSWER_STYLES, *STRICT_STYLES):
        # The system message of a strict family's template precedes that of a conversation, and is not replaced by it.
        family = replace(style, instructions=system or "") if style.is_strict else replace(style, default_system=system)
        if all(_matches(probe, (), family, apply) for probe in _PROBES):
            found.append(_with_thinking(_with_tools(family, apply), apply))
            if found[-1].knows_thinking:
                return found[-1]
    if found:
        return found[0]
    raise ConfigError(
        "tokenizer_config.json: the checkpoint's chat template does not write plain conversations as any known Qwen "
        "template does",
        "Restore the official chat template of the checkpoint",
    )


def _default_system(apply: ApplyTemplate) -> str | None:
    before, _, _ = apply([{"role": "user", "content": "u"}], (), True).partition(f"{IM_START}user\nu")
    opening, closing = f"{IM_START}system\n", f"{IM_END}\n"
    if before.startswith(opening) and before.endswith(closing):
        return before[len(opening) : -len(closing)]
    return None


def _with_tools(family: Family, apply: ApplyTemplate) -> Family:
    """Return the family with the tool form that matches, if there is one."""
    for form in (*HERMES_FORMS, *XML_FORMS):
        with_form = replace(family, tool_form=form)
        probes = (*_TOOL_PROBES, _STRING_ARGUMENTS_PROBE) if form.keeps_strings else _TOOL_PROBES
        if all(_matches(probe, _TOOLS, with_form, apply) for probe in probes):
            return with_form
    return family


def _with_thinking(family: Family, apply: ApplyTemplate) -> Family:
    """Return the family with ``knows_thinking`` decided."""
    probes = (*_THINKING_PROBES, _STEPS_PROBE) if family.tool_form else _THINKING_PROBES
    return replace(family, knows_thinking=all(_matches(probe, (), family, apply) for probe in probes))


def _matches(probe: Sequence[Turn], tools: Sequence[Tool], family: Family, apply: ApplyTemplate) -> bool:
    """Check that a probe, and the prompt for its last answer, have the template's text; false if the template fails."""
    try:
        whole, prompt = apply(_messages(probe), tools, False), apply(_messages(probe[:-1]), tools, True)
    except (TemplateError, TypeError, ValueError, ArithmeticError, AttributeError, LookupError):
        return False
    turns = as_template_reads(probe, family)
    return _closed(whole) == text_of(render(turns, family, tools=tools)) and prompt == text_of(
        render_prompt(turns[:-1], family, tools=tools)
    )


def as_template_reads(turns: Sequence[Turn], family: Family) -> list[Turn]:
    """Return the turns without what the templates of a family ignore: most ignore ``reasoning_content``."""
    return [turn if family.has_thinking_field else turn._replace(thinking=None) for turn in turns]


def _messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    return [_message(turn) for turn in turns]


def _message(turn: Turn) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role, "content": turn.content}
    if turn.thinking is not None:
        message["reasoning_content"] = turn.thinking
    if turn.calls:
        message["tool_calls"] = [{"type": "function", "function": call._asdict()} for call in turn.calls]
    return message


def _closed(text: str) -> str:
    """Close the last message, which the template of Qwen1.5's launch leaves open."""
    return text if text.endswith(f"{IM_END}\n") else f"{text}{IM_END}\n"
