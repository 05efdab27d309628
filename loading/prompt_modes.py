"""The chat formats of a run: behind prompts that ask for thinking and behind those that do not."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Literal

from chat.families import Family
from chat.samples import Thinking, opens_thinking
from errors import ConfigError
from loading.chat_family import chat_family
from loading.checkpoint import Checkpoint
from loading.opening import library_errors

FLAG = "--chat_template_kwargs"
_SWITCH = "enable_thinking"
# Set by who renders a conversation, not by a user.
_RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")


def prompt_families(
    checkpoint: Checkpoint, thinking: Thinking, template_kwargs: Mapping[str, Any] | None = None
) -> tuple[Family, Family]:
    """Return the families behind prompts with thinking and without it; the same if the template has no switch.

    Args:
        thinking: ``on`` and ``off`` need one of them only, which is then returned twice.
        template_kwargs: further arguments of the chat template, of all prompts and conversations.

    Raises:
        ConfigError: arguments that the template does not have or refuses, or a kind of prompts that it does not have.
    """
    kwargs = dict(template_kwargs or {})
    _check_names(checkpoint, kwargs)
    if not _mentions(checkpoint, _SWITCH):
        family = _family(checkpoint, kwargs) if kwargs else checkpoint.family
        families = family, family
    elif thinking in ("on", "off"):
        family = _family(checkpoint, {**kwargs, _SWITCH: thinking == "on"})
        families = family, family
    else:
        families = _family(checkpoint, {**kwargs, _SWITCH: True}), _family(checkpoint, {**kwargs, _SWITCH: False})
    _check_mode(families[0], thinking)
    return families


def prompt_family(
    checkpoint: Checkpoint, thinking: Literal["on", "off"] | None, template_kwargs: Mapping[str, Any] | None = None
) -> Family:
    """Return the family behind prompts with thinking, without it, or (``None``) as the template's default is.

    Raises:
        ConfigError: as ``prompt_families``.
    """
    if thinking is not None:
        return prompt_families(checkpoint, thinking, template_kwargs)[0]
    kwargs = dict(template_kwargs or {})
    _check_names(checkpoint, kwargs)
    return _family(checkpoint, kwargs) if kwargs else checkpoint.family


def _check_mode(family: Family, thinking: Thinking) -> None:
    if thinking == "on" and not family.has_thinking:
        raise ConfigError(f"--thinking on: the chat format {family.name!r} has no thinking", "Leave it out")
    if thinking == "off" and opens_thinking(family):
        what = f"--thinking off: every answer of this checkpoint begins with thinking (chat format {family.name!r})"
        raise ConfigError(what, "Leave it out and train answers with thinking, or take a checkpoint with both")


def _check_names(checkpoint: Checkpoint, kwargs: Mapping[str, Any]) -> None:
    for name in kwargs:
        if name == _SWITCH:
            raise ConfigError(f"{FLAG}: {name} is decided for each answer", "Give --thinking on or off instead")
        if name in _RESERVED or not _mentions(checkpoint, name):
            raise ConfigError(f"{FLAG}: the checkpoint's chat template has no argument {name!r}", "Leave it out")


def _mentions(checkpoint: Checkpoint, name: str) -> bool:
    """Return whether the chat template has a name; what it does not mention changes no text."""
    template = getattr(checkpoint.tokenizer, "chat_template", None)
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", str(template or "")) is not None


def _family(checkpoint: Checkpoint, kwargs: Mapping[str, Any]) -> Family:
    given = {name: value for name, value in kwargs.items() if name != _SWITCH}
    place = f"{FLAG} {json.dumps(given)}" if given else f"{checkpoint.folder}: its chat template"
    try:
        with library_errors(place, "Restore the official chat template of the checkpoint"):
            return chat_family(checkpoint.model_type, checkpoint.tokenizer, **kwargs)
    except ConfigError as error:
        if not given:
            raise
        raise ConfigError(f"{place} cannot be used: {error}") from None
