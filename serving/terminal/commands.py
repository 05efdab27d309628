"""Commands of the terminal chat: lines that begin with a colon."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from errors import ConfigError
from serving.formats import OptionError
from serving.requests import BASE, Sampling
from serving.terminal.session import Session

# Settings of :config and the types of their values.
_SETTINGS: dict[str, type[float] | type[int]] = {
    "temperature": float, "top_p": float, "top_k": int, "repetition_penalty": float, "presence_penalty": float,
    "frequency_penalty": float, "max_tokens": int,
}  # fmt: skip
_DEFAULT = "default"
_SWITCH = {"on": True, "off": False, _DEFAULT: None}


class Quit(Exception):
    """The user leaves."""


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        names: its name, then the shorter ones of the original.
        argument: what it takes, for ``:help``.
        help: what it does.
        run: method of ``Commands``; takes the rest of the line, returns what is shown.
    """

    names: tuple[str, ...]
    argument: str
    help: str
    run: Callable[[Commands, str], str]


class Commands:
    """The commands of a session.

    Args:
        clear: clears the screen.
    """

    def __init__(self, session: Session, clear: Callable[[], object] = lambda: None) -> None:
        self.session = session
        self._clear = clear

    def run(self, line: str) -> str:
        """Run a command and return what it says.

        Raises:
            ConfigError: unknown, or a wrong argument.
            Quit: the user leaves.
        """
        name, _, argument = line.removeprefix(":").partition(" ")
        command = _BY_NAME.get(name.strip())
        if command is None:
            close = get_close_matches(name, _BY_NAME, 1)
            what = f"Use :{close[0]}" if close else "Use :help, or begin a question with :: for a colon"
            raise ConfigError(f":{name} is not a command", what)
        if argument.strip() and not command.argument:
            raise ConfigError(f":{name} {argument}: it takes nothing", f"Use :{name}")
        return command.run(self, argument.strip())

    def help(self, _: str) -> str:
        names = [" ".join(f":{name}" for name in command.names) + f" {command.argument}" for command in COMMANDS]
        width = max(map(len, names))
        lines = [f"{name:<{width}}  {command.help}" for name, command in zip(names, COMMANDS, strict=True)]
        return "\n".join(lines)

    def quit(self, _: str) -> str:
        raise Quit

    def clear(self, _: str) -> str:
        self._clear()
        return ""

    def clear_history(self, _: str) -> str:
        count, self.session.turns = len(self.session.turns), []
        return f"{count} messages forgotten"

    def history(self, _: str) -> str:
        turns = self.session.turns
        return "\n".join(f"{turn.role}: {turn.content}" for turn in turns) or "no messages yet"

    def seed(self, text: str) -> str:
        if text:
            self._change(seed=None if text == "random" else _number("seed", text, int))
        seed = self.session.sampling.seed
        return "seed: random" if seed is None else f"seed: {seed}"

    def config(self, text: str) -> str:
        changes: dict[str, Any] = {}
        for word in text.split():
            name, sign, value = word.partition("=")
            if not sign or name not in _SETTINGS:
                raise ConfigError(f":config {word}", f"Write NAME=VALUE; names: {', '.join(_SETTINGS)}")
            changes[name] = None if value == _DEFAULT else _number(name, value, _SETTINGS[name])
        self._change(**changes)
        values = self.session.sampling.filled(self.session.engine.defaults)
        return "\n".join(f"{name}: {_shown(getattr(values, name))}" for name in _SETTINGS)

    def reset_config(self, _: str) -> str:
        self.session.sampling = self.session.first_sampling
        return self.config("")

    def system(self, text: str) -> str:
        if text:
            self.session.system = None if text == _DEFAULT else text
        system = self.session.system
        default = self.session.engine.family.default_system
        return f"system message: {system if system is not None else default or 'none'}"

    def adapter(self, text: str) -> str:
        session, engine = self.session, self.session.engine
        if text:
            session.adapter = None if text == BASE else engine.adapter_of(text)
        known = [BASE, *engine.adapters]
        return "\n".join(f"{'*' if name == (session.adapter or BASE) else ' '} {name}" for name in known)

    def thinking(self, text: str) -> str:
        return self._switch("enable_thinking", "thinking", text)

    def keep_thinking(self, text: str) -> str:
        return self._switch("preserve_thinking", "keep-thinking", text)

    def effort(self, text: str) -> str:
        if text:
            self._set_option("reasoning_effort", f":effort {text}", None if text == _DEFAULT else text)
        return f"effort: {self.session.options.reasoning_effort or _DEFAULT}"

    def _switch(self, option: str, command: str, text: str) -> str:
        """Show or set an option of the template that is a truth value."""
        if text:
            if text not in _SWITCH:
                raise ConfigError(f":{command} {text}", f"Use {', '.join(_SWITCH)}")
            self._set_option(option, f":{command} {text}", _SWITCH[text])
        value = getattr(self.session.options, option)
        return f"{command}: {next(word for word, each in _SWITCH.items() if each is value)}"

    def _set_option(self, option: str, line: str, value: bool | str | None) -> None:
        change: dict[str, Any] = {option: value}
        options = replace(self.session.options, **change)
        try:
            self.session.engine.family_of(options)
        except OptionError as error:
            raise ConfigError(f"{line}: {error.reason}", f"Use {line.split()[0]} {_DEFAULT}") from None
        self.session.options = options

    def save(self, text: str) -> str:
        if not text:
            raise ConfigError(":save", "Name a file: :save conversations.jsonl")
        if not self.session.turns:
            raise ConfigError(f":save {text}: there are no messages yet", "Ask something first")
        try:
            self.session.save(Path(text).expanduser())
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f":save {text}: {reason}", "Name another file") from error
        return f"appended to {text}, as training data"

    def _change(self, **values: Any) -> None:
        self.session.sampling = replace(self.session.sampling, **values)


COMMANDS = (
    Command(("help", "h"), "", "show these lines", Commands.help),
    Command(("quit", "exit", "q"), "", "leave; Ctrl-D too", Commands.quit),
    Command(("clear", "cl"), "", "clear the screen", Commands.clear),
    Command(("clear-history", "clh"), "", "forget the conversation", Commands.clear_history),
    Command(("history", "his"), "", "show the conversation", Commands.history),
    Command(("seed",), "[NUMBER | random]", "show or set the seed", Commands.seed),
    Command(("config", "conf"), "[NAME=VALUE ...]", "show or set how tokens are chosen", Commands.config),
    Command(("reset-config", "reset-conf"), "", "choose tokens as at the start", Commands.reset_config),
    Command(("system",), "[TEXT | default]", "show or set the system message", Commands.system),
    Command(("adapter",), "[NAME | base]", "show the adapters, or let one answer", Commands.adapter),
    Command(("thinking",), "[on | off | default]", "whether answers begin with thinking", Commands.thinking),
    Command(
        ("keep-thinking",), "[on | off | default]", "whether earlier thinking is read again", Commands.keep_thinking
    ),
    Command(("effort",), "[low | medium | ... | default]", "how much the model is told to think", Commands.effort),
    Command(("save",), "FILE", "append the conversation to a file, as training data", Commands.save),
)
_BY_NAME = {name: command for command in COMMANDS for name in command.names}
NAMES = tuple(_BY_NAME)
assert set(_SETTINGS) <= {field.name for field in fields(Sampling)}, "settings of a request"


def _number(name: str, text: str, kind: type[float] | type[int]) -> float | int:
    try:
        return kind(text)
    except ValueError:
        fix = f"Give a {'whole ' if kind is int else ''}number"
        raise ConfigError(f"{name} {text!r} is not a number", fix) from None


def _shown(value: float | None) -> str:
    return "not limited" if value is None else str(value) if isinstance(value, int) else f"{value:g}"
