"""Log lines and the progress bar: widths, times, and terminals."""

from __future__ import annotations

import fcntl
import logging
import os
import pty
import struct
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm
from transformers import TrainerControl, TrainerState, TrainingArguments

from console import LineHandler, terminal_width
from training.display import ProgressBar, describe_logs, draws_bars, log_line
from training.progress import Counts, Progress

LOGS = {
    "loss": 1.23456789, "token_accuracy": 0.7134, "learning_rate": 2.99e-4, "grad_norm": 0.53219,
    "tokens_per_second": 12345.6, "padding": 0.1234, "peak_memory_gib": 3.219, "eta_seconds": 3723.4, "epoch": 0.5,
}  # fmt: skip


class Screen:
    """What a terminal of ``columns`` columns received."""

    def __init__(self, columns: int) -> None:
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def rows(self) -> list[str]:
        """Return every text that was written to a row, also those that were overwritten."""
        os.set_blocking(self.master, False)
        data = b""
        try:
            while chunk := os.read(self.master, 65536):
                data += chunk
        except (BlockingIOError, OSError):
            pass
        return [row for line in data.decode().replace("\x1b[A", "\n").split("\n") for row in line.split("\r")]


@contextmanager
def terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Screen]:
    screen = Screen(columns)
    with open(screen.slave, "w", encoding="utf-8", closefd=False) as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        patch.delenv("COLUMNS", raising=False)
        patch.setenv("TERM", "xterm")
        yield screen
    os.close(screen.slave)
    os.close(screen.master)


def show_run(bar: ProgressBar, args: TrainingArguments, first: int, last: int) -> None:
    """Let a bar show a run that begins after step ``first``, with a log line per step and an evaluation."""
    state, control = TrainerState(global_step=first, max_steps=last), TrainerControl()
    bar.on_train_begin(args, state, control)
    while state.global_step < last:
        state.global_step += 1
        bar.progress.add(Counts(steps=1))
        bar.on_step_end(args, state, control)
        bar.on_log(args, state, control, logs=dict(LOGS))
    for _ in range(3):
        bar.on_prediction_step(args, state, control, eval_dataloader=[1, 2, 3])
    bar.on_evaluate(args, state, control)
    bar.on_log(args, state, control, logs={"eval_loss": 1.5, "eval_token_accuracy": 0.5})
    bar.on_train_end(args, state, control)


@pytest.mark.parametrize("columns", [40, 80, 132])
def test_a_step_takes_one_row_of_the_terminal(columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with terminal(columns, monkeypatch) as screen:
        assert terminal_width(sys.stderr) == columns and draws_bars(None)
        show_run(ProgressBar(Progress()), args, 0, 3)
        rows = screen.rows()
    assert max(map(len, rows)) <= columns
    lines = [row for row in rows if row.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == ["step 1/3", "step 2/3", "step 3/3", "step 3/3"]
    figures = describe_logs(LOGS).split(", ")
    for line in lines[:3]:
        shown = line.split(": ", 1)[1].split(", ")
        assert shown == figures[: len(shown)]  # no figure is cut
    assert columns < 80 or "grad norm 0.532" in lines[0]
    bars = [row for row in rows if "%|" in row]
    assert any(row.startswith("evaluation ") for row in bars)
    assert columns < 80 or all(row.split("|")[1].count("█") >= 20 for row in bars if "100%" in row)
    assert not any("loss" in row for row in bars) and not any("left" in line for line in lines)


def test_columns_of_the_environment_take_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(132, monkeypatch):
        for value, width in (("61", 61), ("", 132), ("x", 132), ("0", 132)):
            monkeypatch.setenv("COLUMNS", value)
            assert terminal_width(sys.stderr) == width
        monkeypatch.setenv("TERM", "dumb")
        assert terminal_width(sys.stderr) is None


def test_the_bar_of_a_resumed_run_counts_only_steps_of_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four of ten steps are left after two steps that took a minute each."""
    progress = Progress()
    progress.restore({"elapsed": 5000.0, "counts": {"steps": 4}})
    progress._process_started = time.monotonic() - 120
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    state, control = TrainerState(global_step=4, max_steps=10), TrainerControl()
    with terminal(80, monkeypatch) as screen:
        bar = ProgressBar(progress)
        bar.on_train_begin(args, state, control)
        assert "| 4/10" in screen.rows()[-1]
        for _ in range(2):
            state.global_step += 1
            progress.add(Counts(steps=1))
        bar.on_step_end(args, state, control)
        figures = progress.end_window(steps_left=4)
        bar.training_bar.refresh()
        assert "| 6/10, 0:04:00 left" in screen.rows()[-1]
        bar.on_train_end(args, state, control)
    assert log_line(state, {**LOGS, **figures}).endswith(", 0:04:00 left")


def test_speed_counts_all_tokens_but_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    progress = Progress()
    progress.add(Counts(steps=1, loss=1.0, targets=10, tokens=600, slots=800))
    monkeypatch.setattr(time, "monotonic", lambda: progress.window_started + 2)
    assert progress.end_window(steps_left=0)["tokens_per_second"] == 300


def test_no_bar_is_drawn_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert (draws_bars(None), draws_bars(False), draws_bars(True)) == (False, True, False)
    state: Any = TrainerState(global_step=2, max_steps=5)
    line = log_line(state, LOGS)
    assert line == f"step 2/5: {describe_logs(LOGS)}, 1:02:03 left"
    assert line.count("loss") == line.count("left") == 1


def test_log_lines_stand_above_a_bar_and_break_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(60, monkeypatch) as screen:
        logger = logging.getLogger("test.display")
        logger.propagate = False
        handler = LineHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("12:00:00 %(levelname)s %(message)s"))
        logger.addHandler(handler)
        text = (
            "a warning of several words that does not fit into one row of this terminal, /with/a/long/path/in/it.json"
        )
        with tqdm(total=2, file=sys.stderr) as bar:
            bar.update()
            logger.warning("%s", text)
            monkeypatch.setenv("NO_COLOR", "1")
            logger.warning("short")
            bar.refresh()
        logger.removeHandler(handler)
        rows = [row.strip() for row in screen.rows() if row.strip()]
    plain = [row.replace("\x1b[33m", "").replace("\x1b[0m", "") for row in rows]
    lines = [row for row in plain if "%|" not in row]
    assert lines[-1] == "12:00:00 WARNING short" == rows[plain.index(lines[-1])]
    assert " ".join(lines[:-1]) == f"12:00:00 WARNING {text}" and max(map(len, lines)) < 60
    assert "\x1b[33mWARNING\x1b[0m" in rows[plain.index(lines[0])]
