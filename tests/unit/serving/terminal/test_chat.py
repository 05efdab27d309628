"""The terminal chat: plain streams, a terminal, commands, a stopped answer, hostile text."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chat.events import Content, Event, Thinking
from chat.turns import Turn
from console import visible
from data_utils.files import read_records
from data_utils.formats import FORMATS
from data_utils.schema import Notes
from errors import ConfigError
from scripts.chat import main, parse_args
from serving.engine import Engine
from serving.requests import Sampling
from serving.terminal.commands import COMMANDS, Commands, Quit
from serving.terminal.loop import converse
from serving.terminal.screens import PlainScreen, TerminalScreen, create_history
from serving.terminal.session import Session
from tests.models import TINY
from tests.serving import load_engine

GREEDY = Sampling(temperature=0.0, repetition_penalty=1.0, max_tokens=8)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with load_engine(TINY, max_concurrency=2) as loaded:
        yield loaded


@pytest.fixture
def session(engine: Engine) -> Session:
    return Session(engine, GREEDY)


def typed(session: Session, text: str) -> tuple[str, str, bool]:
    """Return answers and notes of lines that are piped, and whether all were answered."""
    answers, notes = io.StringIO(), io.StringIO()
    all_answered = converse(session, PlainScreen(io.StringIO(text), answers, notes))
    return answers.getvalue(), notes.getvalue(), all_answered


def test_each_piped_line_is_answered_in_the_same_conversation(session: Session, engine: Engine) -> None:
    answers, notes, all_answered = typed(session, "Hi\n\nGo on.\n")
    assert [turn.role for turn in session.turns] == ["user", "assistant"] * 2
    assert answers == visible("".join(f"{turn.content}\n" for turn in session.turns[1::2])) and all_answered
    assert notes == "the answer reached its length limit\n" * 2
    assert typed(Session(engine, GREEDY), "Hi\nGo on.\n")[0] == answers


def test_text_with_a_colon_and_control_tokens_is_a_question(session: Session) -> None:
    typed(session, "::help\n<|im_end|>\n")
    assert [turn.content for turn in session.turns[::2]] == [":help", "<|im_end|>"]
    ids = session.engine.render_turns(session.turns)
    assert ids.count(session.engine.tokenizer.im_end_id) == 5


def test_commands_change_what_is_asked(session: Session, tmp_path: Path) -> None:
    file = tmp_path / "kept.jsonl"
    lines = [":system Be short.", ":seed 7", ":config temperature=0.5 max_tokens=3", "Hi", f":save {file}", ":his"]
    answers, notes, all_answered = typed(session, "\n".join(lines) + "\n")
    assert all_answered and "temperature: 0.5" in notes and "seed: 7" in notes and "user: Hi" in notes
    assert (session.sampling.seed, session.sampling.max_tokens, session.system) == (7, 3, "Be short.")
    record = json.loads(file.read_text())
    contents = [message["content"] for message in record["messages"]]
    assert [*contents[:2], visible(contents[2])] == ["Be short.", "Hi", answers.removesuffix("\n")]
    assert typed(session, ":clear-history\n:reset-config\n:system default\n:adapter\n")[1].startswith("2 messages")
    assert (session.turns, session.sampling, session.system) == ([], GREEDY, None)


def test_numbers_are_shown_as_they_are(session: Session) -> None:
    assert "max_tokens: 12345678\n" in typed(session, ":config max_tokens=12345678\n")[1]


def test_saved_thinking_is_training_data(session: Session, tmp_path: Path) -> None:
    file = tmp_path / "kept.jsonl"
    session.turns = [Turn("user", "2 + 2?"), Turn("assistant", "四", thinking="Easy.")]
    assert typed(session, f":save {file}\n")[2]
    assert "Name another file" in typed(session, ":save a\0b\n")[1]
    [(_, record)] = read_records(file)
    assert FORMATS["messages"].read(record, Notes())[0] == session.turns


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (":hepl", ":hepl is not a command. Use :help"), (":quit now", ":quit now: it takes nothing"),
        (":config top=1", "Write NAME=VALUE"), (":config top_p=x", "top_p 'x' is not a number"),
        (":config top_p=7", "top_p: must be a number from 0 to 1, not 7.0"), (":seed 1.5", "seed '1.5'"),
        (":adapter x", "'x' is not loaded"), (":save", "Name a file"), (":save x", "no messages yet"),
        (":thinking maybe", "Use on, off, default"), (":thinking on", ":thinking on: this model never thinks."),
    ],
)  # fmt: skip
def test_wrong_command_is_one_line_and_the_chat_goes_on(session: Session, line: str, message: str) -> None:
    answers, notes, all_answered = typed(session, f"{line}\n:seed 3\n")
    assert message in notes.splitlines()[0] and not all_answered and not answers
    assert session.sampling.seed == 3


def test_a_conversation_that_is_too_long_is_refused_and_kept(session: Session) -> None:
    typed(session, "Hi\n")
    before = list(session.turns)
    _, notes, all_answered = typed(session, "x y " * session.engine.context_length + "\n")
    assert "Shorten the conversation" in notes and not all_answered and session.turns == before


def test_help_names_every_command_and_quit_leaves(session: Session) -> None:
    shown = Commands(session).run(":h")
    assert all(f":{name}" in shown for command in COMMANDS for name in command.names)
    assert typed(session, ":quit\nHi\n") == ("", "", True)
    with pytest.raises(Quit):
        Commands(session).run(":q")


class Impatient(PlainScreen):
    """A terminal whose user presses Ctrl-C during every answer; twice in a row if ``is_hasty``."""

    has_user, is_hasty = True, False

    def show_answer(self, events: Any) -> None:
        self.first = next(iter(events))
        raise KeyboardInterrupt

    def show_note(self, text: str) -> None:
        if self.is_hasty and "stopped" in text:
            raise KeyboardInterrupt
        super().show_note(text)


def test_ctrl_c_twice_leaves_no_chat_and_ends_a_pipe(session: Session) -> None:
    notes = io.StringIO()
    hasty = Impatient(io.StringIO("Hi\n:seed 3\n"), io.StringIO(), notes)
    hasty.is_hasty = True
    assert converse(session, hasty) and notes.getvalue() == "seed: 3\n"
    piped = Impatient(io.StringIO("Hi\nGo on.\n"), io.StringIO(), notes)
    piped.has_user = False
    with pytest.raises(KeyboardInterrupt):
        converse(session, piped)


def test_stopped_answer_stays_as_it_is_and_frees_its_place(engine: Engine) -> None:
    session = Session(engine, Sampling(temperature=0.0, max_tokens=400, ignore_end=True))

    notes = io.StringIO()
    screen = Impatient(io.StringIO("Hi\n"), io.StringIO(), notes)
    assert converse(session, screen) and notes.getvalue() == "\nstopped\n"
    assert session.turns == [Turn("user", "Hi"), Turn("assistant", screen.first.text)]
    assert engine.submit(_short(engine)).answer().finish_reason == "length"
    assert engine.load_now().running == 0


def _short(engine: Engine) -> Any:
    from serving.requests import Request

    return Request(engine.encode("Hi"), Sampling(temperature=0.0, max_tokens=1, ignore_end=True))


def test_terminal_edits_several_lines_and_dims_thinking(tmp_path: Path) -> None:
    pytest.importorskip("prompt_toolkit")
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput
    from rich.console import Console

    shown = io.StringIO()
    rich = Console(file=shown, force_terminal=True, color_system="standard", width=80, highlight=False)
    history = tmp_path / "history"
    with create_pipe_input() as keys:
        keys.send_text("first\x1b\rsecond\r" + "dropped\x03" + ":he\n" + "\x04")
        screen = TerminalScreen(history, keys, DummyOutput(), rich)
        assert screen.read() == "first\nsecond"
        with pytest.raises(KeyboardInterrupt):
            screen.read()
        assert screen.read() == ":he"
        assert screen.read() is None
    assert [line for line in history.read_text().splitlines() if line.startswith("+")] == ["+first", "+second", "+:he"]
    events: list[Event] = [Thinking("hm"), Content("[bold]a\x1b[2J"), Content("b\n")]
    screen.show_answer(events)
    assert "\x1b[2mhm\x1b[0m\n" in shown.getvalue()
    assert "[bold]a" in shown.getvalue() and "\x1b[2J" not in shown.getvalue()


def test_file_of_earlier_lines_that_cannot_be_written_ends_no_chat(tmp_path: Path) -> None:
    pytest.importorskip("prompt_toolkit")
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput
    from rich.console import Console

    for path in (tmp_path, tmp_path / "file" / "history", Path("/dev/null")):
        (tmp_path / "file").touch()
        with pytest.raises(ConfigError, match=f"--history_file {path}: .*give --no_history"):
            create_history(path)
    history, shown = tmp_path / "gone" / "history", io.StringIO()
    create_history(history)
    assert history.stat().st_mode & 0o777 == 0o600
    with create_pipe_input() as keys:
        keys.send_text("one\rtwo\r")
        screen = TerminalScreen(history, keys, DummyOutput(), Console(file=shown))
        history.unlink()
        history.parent.rmdir()
        assert [screen.read(), screen.read()] == ["one", "two"]
    assert shown.getvalue().count("No such file or directory") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--adapter", "x"], "--adapter x: .*Write NAME=DIR"),
        (["--history_file", "a", "--no_history"], "contradicts"),
    ],
)
def test_wrong_flags_are_refused(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_args(["--model_name_or_path", "m", *argv])


def test_command_answers_a_pipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("prompt_toolkit")
    flags = ["--temperature", "0", "--max_tokens", "4", "--kv_cache", "int8", "--no_history"]
    monkeypatch.setattr("sys.stdin", io.StringIO(":wrong\nHi\n"))
    assert main(["--model_name_or_path", str(TINY), *flags]) == 1
    first = capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO(":seed 3\nHi\n"))
    assert main(["--model_name_or_path", str(TINY), *flags]) == 0
    captured = capsys.readouterr()
    assert captured.out == first.out != ""
    assert captured.out.count("\n") >= 1 and "seed: 3" in captured.err and "seed" not in captured.out
