"""The chat formats of a run: behind prompts that ask for thinking and behind those that do not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chat.detect import TemplateFailure
from chat.families import Family
from chat.samples import Thinking, opens_thinking
from chat.template_arguments import reads_argument, refused_argument, template_text
from errors import ConfigError
from loading.chat_family import chat_family
from loading.checkpoint import Checkpoint

_SWITCH = "enable_thinking"


def prompt_families(
    checkpoint: Checkpoint, thinking: Thinking | None, arguments: Mapping[str, Any]
) -> tuple[Family, Family]:
    """Return the families behind prompts with thinking and without it; the same if the template has no switch.

    Args:
        thinking: ``on`` and ``off`` need one of them only, which is then returned twice; so does ``None``, the
            template's default.
        arguments: others of the chat template, for all prompts and conversations.

    Raises:
        ConfigError: an argument that the template does not have or refuses, or a kind of prompts that it does not have.
    """
    template = template_text(checkpoint.tokenizer)
    for name in arguments:
        if not reads_argument(template, name):
            raise ConfigError(
                f"{_shown(arguments, name)}: the checkpoint's chat template has no {name}", "Leave it out"
            )
    if thinking is None or not reads_argument(template, _SWITCH):
        family = _family(checkpoint, arguments) if arguments else checkpoint.family
        families = family, family
    elif thinking in ("on", "off"):
        family = _family(checkpoint, arguments, thinking == "on")
        families = family, family
    else:
        families = _family(checkpoint, arguments, True), _family(checkpoint, arguments, False)
    _check_mode(families[0], thinking)
    return families


def _check_mode(family: Family, thinking: Thinking | None) -> None:
    if thinking == "on" and not family.has_thinking:
        raise ConfigError(f"--thinking on: the chat format {family.name!r} has no thinking", "Leave it out")
    if thinking == "off" and opens_thinking(family):
        what = f"--thinking off: every answer of this checkpoint begins with thinking (chat format {family.name!r})"
        raise ConfigError(what, "Leave it out, or take a checkpoint that also answers without")


def _family(checkpoint: Checkpoint, arguments: Mapping[str, Any], thinks: bool | None = None) -> Family:
    switched = arguments if thinks is None else {**arguments, _SWITCH: thinks}
    try:
        return chat_family(checkpoint.model_type, checkpoint.tokenizer, **switched)
    except TemplateFailure as error:
        if not arguments:
            raise
        name = refused_argument(arguments)
        what = f"{_shown(arguments, name)}: the checkpoint's chat template {error.reason}"
        raise ConfigError(what, "Give a value that it knows, or leave it out") from None


def _shown(arguments: Mapping[str, Any], name: str) -> str:
    value = arguments[name]
    return f"--{name} {'on' if value is True else 'off' if value is False else value}"
