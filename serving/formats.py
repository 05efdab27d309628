"""The chat format of each combination of arguments that a request may give the checkpoint's template."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass

from chat.detect import TemplateFailure
from chat.families import EMPTY_THOUGHT, Family
from chat.template_arguments import reads_argument, refused_argument
from errors import ConfigError
from serving.requests import RequestError, shown


@dataclass(frozen=True)
class TemplateOptions:
    """Arguments of a chat template, by the names that templates have for them. ``None``: not given.

    Attributes:
        enable_thinking: answers begin with thinking.
        preserve_thinking: the thinking of answers before the last question stays in the prompt.
        reasoning_effort: how much the model is told to think.
    """

    enable_thinking: bool | None = None
    preserve_thinking: bool | None = None
    reasoning_effort: str | None = None


class OptionError(RequestError):
    """An option that the checkpoint's template does not fulfil.

    Attributes:
        name: of the option.
        reason: why.
    """

    def __init__(self, name: str, value: bool | str, reason: str, place: str | None = None) -> None:
        super().__init__(place or name, f"{shown(value)} is not possible: {reason}", "Leave it out")
        self.name, self._value, self.reason = name, value, reason

    def at(self, place: str) -> OptionError:
        """Return the error with the place of the option in a request."""
        return OptionError(self.name, self._value, self.reason, place)


class Formats:
    """Chat formats of one checkpoint, each detected when it is first asked for: that takes some tenths of a second.

    Args:
        default: the format without arguments.
        detect: returns the format with arguments of the template.
        template: text of the checkpoint's chat template.
    """

    def __init__(self, default: Family, detect: Callable[..., Family], template: str) -> None:
        self._default, self._detect, self._template = default, detect, template
        self._found: dict[tuple[object, ...], Family | str] = {}
        self._lock = threading.Lock()

    def family(self, options: TemplateOptions) -> Family:
        """Return the format that a request asks for.

        Raises:
            OptionError: the checkpoint's template has no such format.
        """
        given = {name: value for name, value in asdict(options).items() if value is not None}
        known = {name: value for name, value in given.items() if reads_argument(self._template, name)}
        found = self._with(known) if known else self._default
        if isinstance(found, str):
            name = refused_argument(known)
            raise OptionError(name, known[name], found)
        for name, value in given.items():
            if fault := _fault(name, value, found, name in known):
                raise OptionError(name, value, fault)
        return found

    def _with(self, known: dict[str, bool | str]) -> Family | str:
        """Return the format with arguments that the template knows, or why there is none."""
        key = tuple(known.items())
        with self._lock:
            if key not in self._found:
                try:
                    self._found[key] = self._detect(**known)
                except TemplateFailure as error:
                    self._found[key] = f"the checkpoint's chat template {error.reason}"
                except ConfigError:
                    self._found[key] = "the checkpoint's chat template then writes an unknown format"
            return self._found[key]


def _fault(name: str, value: bool | str, family: Family, is_known: bool) -> str:
    """Return why a format does not fulfil an option; empty if it does."""
    if name == "enable_thinking":
        thinks = family.has_thinking and family.prompt_suffix != EMPTY_THOUGHT
        if thinks and not family.prompt_suffix and value is False:
            return "this model's chat template has no prompt without thinking"
        return "" if value == thinks else f"this model {'always' if thinks else 'never'} thinks"
    if name == "preserve_thinking":
        keeps = family.thinking == "kept"
        return "" if value == keeps else f"this model's chat format {'keeps' if keeps else 'loses'} earlier thinking"
    return "" if is_known else "this model's chat template has no such setting"
