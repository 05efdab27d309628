"""The loop of the terminal chat: a line is a command or a question."""

from __future__ import annotations

from contextlib import closing

from errors import ConfigError, RunError
from serving.terminal.commands import Commands, Quit
from serving.terminal.screens import Screen
from serving.terminal.session import Session

_ENDS = {"length": "the answer reached its length limit", "timeout": "the answer took too long"}


def converse(session: Session, screen: Screen) -> bool:
    """Read and answer until the user leaves. Return whether all lines were answered.

    Ctrl-C of a user stops an answer, which stays as it is, or drops the line that is being written; twice does no more.
    Without a user, in a pipe, it ends the program.
    """
    commands, all_answered = Commands(session, screen.clear), True
    while True:
        try:
            line = screen.read()
            if line is None:
                return all_answered
            if line.startswith(":") and not line.startswith("::"):
                screen.show_note(commands.run(line))
            elif line.strip():
                _answer(session, screen, line.removeprefix(":") if line.startswith("::") else line)
        except Quit:
            return all_answered
        except (ConfigError, RunError) as error:
            screen.show_note(str(error))
            all_answered = False
        except KeyboardInterrupt:
            if not screen.has_user:
                raise


def _answer(session: Session, screen: Screen, question: str) -> None:
    events = session.ask(question)
    try:
        with closing(events):
            screen.show_answer(events)
    except KeyboardInterrupt:
        if not screen.has_user:
            raise
        screen.show_note("\nstopped")
        return
    if session.finish_reason in _ENDS:
        screen.show_note(_ENDS[session.finish_reason])
