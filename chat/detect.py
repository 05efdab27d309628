"""Detection of a checkpoint's family.

Checkpoints later than Qwen v1 have a chat template. Short conversations (probes) are rendered with it and with each
known answer style and tool form, and those that give the same text are used. So training writes what the checkpoint's
own template writes. What may differ within a style (default system message, names of roles, white space) is read from
the first probes. A template that writes no ChatML, or in another way, writes conversations itself
(``chat.own_template``). Path names and model names are never used. A template is code of the checkpoint, so the probes
are rendered in a process with limits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError

from chat.chatml import IM_END, IM_START
from chat.families import ANSWER_STYLES, STRICT_STYLES, Family
from chat.limited import LimitExceeded, run_limited
from chat.own_template import MOST_TEXT, OwnTemplate, examine_template
from chat.render import render, render_prompt, text_of
from chat.template_arguments import reads_argument, template_text
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

_SPACES = " \n"
_NAME = re.compile(r"[\w .-]+")
_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, ArithmeticError, AttributeError, LookupError)


ApplyTemplate = Callable[[Sequence[dict[str, Any]], Sequence[Tool], bool], str]

_RESTORE = "Restore the official chat template of the checkpoint, or give another one with --chat_template"


class TemplateFailure(ConfigError):
    """A chat template that cannot be used: it fails, takes too much time, memory or text, or hides its answers.

    Attributes:
        reason: what it does, as the end of a sentence about it.
    """

    def __init__(self, place: object, reason: str, fix: str = _RESTORE) -> None:
        self.reason = reason.rstrip(".")
        super().__init__(f"{place}: the chat template {self.reason}", fix)


def family_of(
    tokenizer: Any, base_system: str | None = None, place: str | None = None, **template_kwargs: Any
) -> Family:
    """Return the family of a checkpoint later than Qwen v1, from its tokenizer's chat template.

    Args:
        base_system: default system message of a base checkpoint, which has no template.
        place: flag and file of a template that replaces the checkpoint's, for messages.
        template_kwargs: arguments of the template, such as ``enable_thinking=False``: the family is of prompts and
            texts with them.

    Raises:
        TemplateFailure: a chat template whose answers cannot be told from what precedes them, that fails, or takes too
            much time, memory or text.
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
        if len(text) > MOST_TEXT:
            raise LimitExceeded(f"writes more than {MOST_TEXT:,} characters for a conversation of a few words")
        return text

    try:
        family = run_limited(lambda: match_template(apply))
        own = None if family else examine_template(_own_template(tokenizer, template_kwargs))
    except (LimitExceeded, ValueError) as error:
        reason = str(error).removeprefix("the chat template ")
        if place is not None:
            raise TemplateFailure(place, reason, "Correct the template") from None
        raise TemplateFailure(_template_file(str(getattr(tokenizer, "name_or_path", ""))), reason) from None
    return family or Family("own template", own_template=own)


def _template_file(folder: str) -> Path:
    file = Path(folder, "chat_template.jinja")
    return file if file.is_file() else Path(folder, "tokenizer_config.json")


def _own_template(tokenizer: Any, template_kwargs: dict[str, Any]) -> OwnTemplate:
    source = template_text(tokenizer)
    # Without those that it does not read: formats with and without them are then equal.
    known = {name: value for name, value in template_kwargs.items() if reads_argument(source, name)}
    arguments = json.dumps({**tokenizer.special_tokens_map, **known}, sort_keys=True, default=str)
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return OwnTemplate(source, arguments, tuple(sorted({*special, *map(str, tokenizer.all_special_tokens)})))


def match_template(apply: ApplyTemplate) -> Family | None:
    """Return the family whose rendering equals that of a chat template; ``None`` if there is none.

    If no tool form matches, the family has none; if thinking does not match, ``knows_thinking`` is false.

    Args:
        apply: renders messages (OpenAI's dicts) and tools to text, with or without the generation prompt.
    """
    seen, template, found = _observe(apply), _Template(apply), []
    for style in (*ANSWER_STYLES, *STRICT_STYLES):
        # The system message of a strict family's template precedes that of a conversation, and is not replaced by it.
        family = replace(style, instructions=seen.system or "") if style.is_strict else seen.adapt(style)
        if all(_matches(probe, (), family, template) for probe in _PROBES):
            found.append(_with_thinking(_with_tools(family, template), template))
            if found[-1].knows_thinking:
                return found[-1]
    return found[0] if found else None


class _Observed(NamedTuple):
    """What may differ within a style; see ``Family``."""

    system: str | None = None
    instructions: str = ""
    role_names: tuple[tuple[str, str], ...] = ()
    trimmed_roles: tuple[str, ...] = ()
    turn_end: str = "\n"

    def adapt(self, style: Family) -> Family:
        return replace(
            style, default_system=None if self.instructions else self.system, instructions=self.instructions,
            role_names=self.role_names, trimmed_roles=self.trimmed_roles, turn_end=self.turn_end,
        )  # fmt: skip


class _Written(NamedTuple):
    """A message in a rendering.

    Attributes:
        before: text before its ``<|im_start|>``.
        opening: text between the header and its own.
        end: text between its ``<|im_end|>`` and what follows.
    """

    before: str
    name: str
    opening: str
    is_trimmed: bool
    end: str


def _observe(apply: ApplyTemplate) -> _Observed:
    """Return what the first probes show of a template; what they do not show is as in the official ones."""
    roles = ("user", "assistant", "user")
    text = _try(apply, roles)
    found = {role: _find(text, role) for role in roles}
    text_with_system = _try(apply, ("system", *roles))
    if system := _find(text_with_system, "system"):
        found["system"] = system
    if not (user := found["user"]):
        return _Observed()
    name = system.name if system else "system"
    seen = _Observed(
        role_names=tuple((role, each.name) for role, each in found.items() if each and each.name != role),
        trimmed_roles=tuple(sorted(role for role, each in found.items() if each and each.is_trimmed)),
        turn_end=user.end,
    )
    opening, closing = f"{IM_START}{name}\n", f"{IM_END}{user.end}"
    if not (user.before.startswith(opening) and user.before.endswith(closing)):
        return seen
    default = user.before[len(opening) : -len(closing)]
    is_kept = system is not None and system.opening == f"{default}\n\n"
    return seen._replace(system=default, instructions=default if is_kept else "")


def _try(apply: ApplyTemplate, roles: Sequence[str]) -> str:
    """Render one message of each role, whose text is its role within white space; return no text on failure."""
    messages = [{"role": role, "content": f"{_SPACES}({role}){_SPACES[::-1]}"} for role in roles]
    try:
        return apply(messages, (), True)
    except _TEMPLATE_ERRORS:
        return ""


def _find(text: str, role: str) -> _Written | None:
    """Return how the first message of a role is written, if it is ChatML."""
    before, word, after = text.partition(f"({role})")
    before, start, header = before.rpartition(IM_START)
    name, line_end, opening = header.partition("\n")
    content_end, end_token, rest = after.partition(IM_END)
    is_trimmed = not opening.endswith(_SPACES)
    end, next_start, _ = rest.partition(IM_START)
    is_chatml = word and start and line_end and end_token and next_start and _NAME.fullmatch(name) and not end.strip()
    if not is_chatml or content_end != ("" if is_trimmed else _SPACES[::-1]):
        return None
    return _Written(before, name, opening if is_trimmed else opening.removesuffix(_SPACES), is_trimmed, end)


class _Template:
    """The texts that a template writes for probes, each rendered once."""

    def __init__(self, apply: ApplyTemplate) -> None:
        self._apply = apply
        self._texts: dict[tuple[int, int], tuple[str, str] | None] = {}

    def texts_of(self, probe: Probe, tools: Sequence[Tool]) -> tuple[str, str] | None:
        """Return a probe's text and the prompt for its last answer; ``None`` if the template fails.

        Args:
            probe, tools: constants of this module.
        """
        key = id(probe), id(tools)
        if key not in self._texts:
            try:
                whole = self._apply(_messages(probe), tools, False)
                self._texts[key] = whole, self._apply(_messages(probe[:-1]), tools, True)
            except _TEMPLATE_ERRORS:
                self._texts[key] = None
        return self._texts[key]


def _with_tools(family: Family, template: _Template) -> Family:
    """Return the family with the tool form that matches, if there is one."""
    for form in (*HERMES_FORMS, *XML_FORMS):
        with_form = replace(family, tool_form=form)
        probes = (*_TOOL_PROBES, _STRING_ARGUMENTS_PROBE) if form.keeps_strings else _TOOL_PROBES
        if all(_matches(probe, _TOOLS, with_form, template) for probe in probes):
            return with_form
    return family


def _with_thinking(family: Family, template: _Template) -> Family:
    """Return the family with ``knows_thinking`` decided."""
    probes = (*_THINKING_PROBES, _STEPS_PROBE) if family.tool_form else _THINKING_PROBES
    return replace(family, knows_thinking=all(_matches(probe, (), family, template) for probe in probes))


def _matches(probe: Probe, tools: Sequence[Tool], family: Family, template: _Template) -> bool:
    """Check that a probe, and the prompt for its last answer, have the template's text; false if the template fails."""
    texts = template.texts_of(probe, tools)
    if texts is None:
        return False
    whole, prompt = texts
    turns = as_template_reads(probe, family)
    return _closed(whole, family) == text_of(render(turns, family, tools=tools)) and prompt == text_of(
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


def _closed(text: str, family: Family) -> str:
    """Close the last message, which the template of Qwen1.5's launch leaves open."""
    end = f"{IM_END}{family.turn_end}"
    return text if text.endswith(end) else text + end
