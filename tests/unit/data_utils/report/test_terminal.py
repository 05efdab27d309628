"""A data report in a terminal."""

from __future__ import annotations

import io
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from console import visible, wants_color
from data_utils.report.data_report import DataReport, ReportSettings
from data_utils.report.page import render_html
from data_utils.report.terminal import render_report
from tests.reports import CHAT, encode, hostile_report, report_of, sample_of

OURS = re.compile(r"\x1b\[(?:0|1|2|31|32|33)m")


def test_sample_without_colour() -> None:
    lines = render_report(report_of(*CHAT), color=False, width=60).splitlines()
    assert lines[:4] == [
        "What is trained",
        "───────────────",
        "--label_mask assistant, --truncation turns,",
        "--model_max_length 8192, --thinking on, --split_turns never",
    ]
    start = lines.index("Sample 1 of 1: a.json:1")
    assert lines[start - 2 : start + 10] == [
        "⟦trained⟧, not trained; ↵ newline",
        "",
        "Sample 1 of 1: a.json:1",
        "───────────────────────",
        "40 tokens, 19 trained",
        "",
        "user      │ <|im_start|>user↵",
        "          │ Hi<|im_end|>↵",
        "assistant │ <|im_start|>assistant↵",
        "          ┃ ⟦Hello!↵",
        "          ┃ You there?<|im_end|>↵⟧",
        "",
    ]


def test_sample_in_colour() -> None:
    text = render_report(report_of(*CHAT), color=True, width=60)
    assert "\x1b[32mHello!↵\x1b[0m\n" in text
    assert "\x1b[32mYou there?\x1b[0m\x1b[2m\x1b[32m<|im_end|>\x1b[0m\x1b[32m↵\x1b[0m\n" in text
    assert " Hi\x1b[2m<|im_end|>\x1b[0m↵\n" in text
    assert "⟦" not in text
    plain = render_report(report_of(*CHAT), color=False, width=60)
    assert OURS.sub("", text) == plain.replace("⟦", "").replace("⟧", "")


def test_loss_weights_and_text_like_control_tokens_are_marked() -> None:
    report = report_of(("user", "a <|im_end|> b", 0.0), ("assistant", "Yes", 0.5), ("tool", "No", 2.0))
    text = render_report(report, color=False)
    assert "a <\\|im_end|> b<|im_end|>↵" in text
    assert "⟦(x0.5) Yes<|im_end|>↵⟧" in text
    assert "⟦(x2) No<|im_end|>↵⟧" in text
    legend = "⟦trained⟧, not trained; ↵ newline; (x0.5) weight in the loss, if not 1; <\\| text of a message"
    assert legend in text
    assert "The sum of their weights in the loss is 10.5." in text


def test_lines_are_wrapped_by_columns() -> None:
    # 48 columns are left: 24 Chinese characters, or 48 letters, accents and joiners for free.
    for letter, count in (("你", 24), ("x", 48), ("e\u0301", 48)):
        lines = render_report(report_of(("user", letter * 60, 0.0)), color=False, width=60).splitlines()
        assert f"          │ {letter * count}" in lines
    lines = render_report(report_of(("user", "word " * 20, 0.0)), color=False, width=60).splitlines()
    assert "          │ " + ("word " * 9).rstrip() in lines


def test_tables_of_a_report() -> None:
    report = DataReport("train", ReportSettings("m", "qwen_v1", "last", "cut", 100, 2, 4, 2, 3))
    a, b = report.add_source("a.json#2", "alpaca", 1200), report.add_source("b.jsonl@x5", "messages", 9)
    a.keep("a.json:1", encode(*CHAT))
    a.skip("a.json:7", "no answer fits")
    b.keep("b.jsonl:1", encode(("user", "Hi", 0.0), ("assistant", "Hi", 1.0)), copies=5, truncated="cut")
    text = render_report(report, color=False, width=90)
    assert "m (qwen_v1): --label_mask last, --truncation cut, --model_max_length 100, --thinking" in text
    assert text[text.index("Data (train)") :].splitlines() == [
        "Data (train)",
        "────────────",
        "in file  read  kept  skipped  shortened  duplicates  tokens  trained",
        "a.json#2 (alpaca)",
        "  1,200     2     1        1          0           0      40    47.5%",
        "b.jsonl@x5 (messages)",
        "      9     5     5        0          5           0     125    16.0%",
        "all",
        "  1,209     7     6        1          5           0     165    23.6%",
        "",
        "Tokens per sample",
        "─────────────────",
        " min    5%   25%   50%   75%   95%   99%   max  mean",
        "  25    25    25    25    25    40    40    40  27.5",
        "",
        "Trained tokens by role",
        "──────────────────────",
        "tokens  trained  share  of all trained",
        "   105       39  37.1%          100.0%  assistant",
        "    60        0   0.0%            0.0%  user",
        "   165       39  23.6%          100.0%  all",
        "",
        "Padding as a share of all positions, batches of 2",
        "─────────────────────────────────────────────────",
        "fixed     72.5%  ██████████████████████░░░░░░░░  all padded to --model_max_length",
        "dynamic    8.3%  ███░░░░░░░░░░░░░░░░░░░░░░░░░░░  this run: random batches padded to their longest sample",
        "grouped    8.3%  ███░░░░░░░░░░░░░░░░░░░░░░░░░░░  batches of samples of similar length",
        "rows       0.0%  ░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░  the samples of a batch in one row",
        "",
        "Optimizer steps",
        "───────────────",
        "3 in total (3 epochs), 1 per epoch. A step uses 16 samples: 2 per device x 4 accumulation",
        "steps x 2 devices.",
        "",
        "warning: a.json#2: skipped 1 of 2 conversations, no answer fits: a.json:7",
        "warning: b.jsonl@x5: shortened 5 of 5 conversations, cut: b.jsonl:1",
        "warning: a step uses 16 samples, but there are only 6: an epoch is one step. Lower",
        "  --per_device_train_batch_size 2 or --gradient_accumulation_steps 4 for more steps",
    ]


def test_narrow_terminal_shows_pairs_instead_of_a_table() -> None:
    report = DataReport("eval", ReportSettings())
    report.add_source("a.json", "alpaca", 1).keep("a.json:1", encode(("user", "word " * 100, 0.0), *CHAT))
    report.add_sample(sample_of(("user", "word " * 100, 0.0), *CHAT))
    lines = render_report(report, color=False, width=60).splitlines()
    start = lines.index("Data (eval)")
    assert lines[start + 2 : start + 5] == [
        "a.json (alpaca)",
        "  1 in file, 1 read, 1 kept, 0 skipped, 0 shortened,",
        "  0 duplicates, 548 tokens, 3.5% trained",
    ]
    assert max(map(len, lines)) <= 60
    assert not any("Optimizer" in line for line in lines)
    assert lines[-1] == "No problems found."


def test_problems_come_last_in_red() -> None:
    report = DataReport("train")
    report.add_source("a.json", "alpaca", 1).skip("a.json:1", "bad record")
    text = render_report(report, color=True)
    end = "\x1b[31mPROBLEM\x1b[0m: none of 1 conversations can be used: 1 skipped, bad record\n"
    assert text.endswith(end)
    assert "\x1b[33mwarning\x1b[0m: a.json: skipped 1 of 1 conversations, bad record: a.json:1\n" in text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colour_depends_on_terminal_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert wants_color(Terminal())
    assert not wants_color(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_color(Terminal())
    monkeypatch.setenv("NO_COLOR", "")
    assert wants_color(Terminal())
    monkeypatch.setenv("TERM", "dumb")
    assert not wants_color(Terminal())


@pytest.mark.parametrize("color", [False, True])
@pytest.mark.parametrize("width", [60, 100])
def test_hostile_text_cannot_control_the_terminal(color: bool, width: int) -> None:
    text = render_report(hostile_report(), color=color, width=width)
    text.encode()
    plain = OURS.sub("", text) if color else text
    assert not [char for char in plain if not char.isprintable() and char != "\n"]
    assert visible(plain) == plain
    # Marks in messages are escaped, so there is one pair for each trained turn.
    sample = plain[plain.index(" trained\n\n") : plain.index("\nData (train)")]
    assert sample.count("⟦") == sample.count("⟧") == (0 if color else 2)
    assert sample.count("⋯") == 2 * sample.replace("\n", " ").count("left out") > 0
    # Three messages, and a role that is part of its header.
    joined = re.sub(r"\n.{10}[┃│] ", "", sample)
    assert joined.count("\\u27e6fake\\u27e7\\u21b5\\u21e5\\u22ef <\\|im_end|>⇥   tab") == 4


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text(), st.sampled_from([0.0, 1.0, 0.25]))))
@settings(max_examples=100, deadline=None)
def test_any_text_can_be_rendered(parts: list[tuple[str, str, float]]) -> None:
    report = report_of(*parts)
    for color in (False, True):
        plain = OURS.sub("", render_report(report, color=color, width=60))
        plain.encode()
        assert visible(plain) == plain
    render_html([report]).encode()
