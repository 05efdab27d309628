"""Where questions come from and answers go: plain streams, or a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, TextIO

from chat.events import Content, Event, Thinking
from console import visible
from errors import ConfigError
from serving.terminal.commands import NAMES


class Screen(Protocol):
    """A reader of lines and a writer of answers.

    Attributes:
        has_user: somebody reads and writes there.
    """

    has_user: bool

    def read(self) -> str | None:
        """Return the next question or command; ``None``: there are no more. ``KeyboardInterrupt``: it was dropped."""

    def show_answer(self, events: Iterable[Event]) -> None:
        """Write an answer while it arrives."""

    def show_note(self, text: str) -> None:
        """Write what is not part of the conversation."""

    def clear(self) -> None:
        """Clear the screen."""


class PlainScreen:
    """Reads a question per line; answers alone go to ``answers``, the rest to ``notes``."""

    has_user = False

    def __init__(self, questions: TextIO, answers: TextIO, notes: TextIO) -> None:
        self._questions, self._answers, self._notes = questions, answers, notes

    def read(self) -> str | None:
        line = self._questions.readline()
        return line.rstrip("\n") if line else None

    def show_answer(self, events: Iterable[Event]) -> None:
        for event in events:
            if isinstance(event, Content):
                self._write(self._answers, visible(event.text))
        self._write(self._answers, "\n")

    def show_note(self, text: str) -> None:
        self._write(self._notes, f"{visible(text)}\n")

    def clear(self) -> None:
        """Do nothing: there is no screen."""

    @staticmethod
    def _write(stream: TextIO, text: str) -> None:
        stream.write(text)
        stream.flush()


class TerminalScreen:
    """Lines with history and completion of commands; thinking is dimmed.

    Args:
        history: file of earlier lines; ``None``: none is kept.
        input, output: prompt_toolkit's, for tests.
        answers: rich's ``Console``, for tests.
    """

    has_user = True

    def __init__(self, history: Path | None, input: Any = None, output: Any = None, answers: Any = None) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.history import InMemoryHistory
        from prompt_toolkit.key_binding import KeyBindings
        from rich.console import Console

        keys = KeyBindings()

        # Enter that is typed during an answer arrives as a line feed.
        @keys.add("enter")
        @keys.add("c-j")
        def _(event: Any) -> None:
            event.current_buffer.validate_and_handle()

        @keys.add("escape", "enter")
        @keys.add("escape", "c-j")
        def _(event: Any) -> None:
            event.current_buffer.insert_text("\n")

        completer = WordCompleter([f":{name}" for name in NAMES], sentence=True)
        self._lost: list[OSError] = []
        self._prompt: PromptSession[str] = PromptSession(
            history=InMemoryHistory() if history is None else _kept_lines(history, self._lost), completer=completer,
            complete_while_typing=False, multiline=True, key_bindings=keys, input=input, output=output,
            prompt_continuation=lambda width, number, is_wrapped: "  ",
        )  # fmt: skip
        self._answers = answers or Console(highlight=False, soft_wrap=True)

    def read(self) -> str | None:
        try:
            line = self._prompt.prompt("> ")
        except EOFError:
            return None
        if self._lost:
            self.show_note(f"--history_file: {self._lost[0].strerror}, so earlier lines are kept until you leave")
            self._lost.clear()
        return line

    def show_answer(self, events: Iterable[Event]) -> None:
        was_thinking = False
        for event in events:
            is_thinking = isinstance(event, Thinking)
            if was_thinking and not is_thinking:
                self._answers.out("\n")
            if isinstance(event, (Content, Thinking)):
                self._answers.out(visible(event.text), style="dim" if is_thinking else None, highlight=False, end="")
            was_thinking = is_thinking
        self._answers.out("")

    def show_note(self, text: str) -> None:
        if text:
            self._answers.out(visible(text), style="dim", highlight=False)

    def clear(self) -> None:
        self._answers.clear()


def _kept_lines(path: Path, lost: list[OSError]) -> Any:
    """Return prompt_toolkit's lines of a file. That the file cannot be written is added to ``lost``, once."""
    from prompt_toolkit.history import FileHistory

    class KeptLines(FileHistory):
        is_lost = False

        def store_string(self, string: str) -> None:
            try:
                if not self.is_lost:
                    super().store_string(string)
            except OSError as error:
                self.is_lost = True
                lost.append(error)

    return KeptLines(str(path))


def open_screen(history: Path | None) -> Screen:
    """Return a terminal's screen if both input and output are one, else plain streams.

    Raises:
        ConfigError: the file of earlier lines cannot be used.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return PlainScreen(sys.stdin, sys.stdout, sys.stderr)
    if history is not None:
        create_history(history)
    return TerminalScreen(history)


def create_history(path: Path) -> None:
    """Create the file of earlier lines, for its user alone.

    Raises:
        ConfigError: it is none that can be written.
    """
    reason = "" if path.is_file() or not path.exists() else "it is not a file"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        with path.open("ab"):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise ConfigError(f"--history_file {path}: {reason}", "Name a file that can be written, or give --no_history")
