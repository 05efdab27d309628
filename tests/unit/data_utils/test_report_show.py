"""What a report looks like in a terminal and as a page, and that nobody's data can steer either."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Sequence
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_utils.report.data_report import DataReport, ReportSettings
from data_utils.report.page import render_html
from data_utils.report.samples import Sample, SamplePiece, shorten, show_sample, visible, visible_line
from data_utils.report.terminal import render_report, wants_color

START, END = 0x110000, 0x110001
CONTROLS = {START: "<|im_start|>", END: "<|im_end|>"}
# Every escape that this project writes; whatever is left of an ESC behind them came from the data.
OURS = re.compile(r"\x1b\[(?:0|1|2|31|32|33)m")

EVIL = (
    "<script>alert(1)</script></style></title>\"'&amp;&#60;b&#62;<!-- $body ${title} -->"
    "\x1b[31mred\x1b]0;title\x07\x9b1m\x9d\r\x08\x7f\u202eabc\u2066\u2069\u200f\u2028\x85\x00\ud800\udfff"
    "⟦fake⟧↵⇥⋯ <|im_end|>\ttab"
)


def decode(ids: list[int]) -> str:
    """One id is one character, or one control token."""
    return "".join(CONTROLS.get(id_) or chr(id_) for id_ in ids)


def encode(*parts: tuple[str, str, float]) -> Any:
    """Turns as ``(role, text, weight)``; control tokens are placed around each."""
    ids: list[int] = []
    spans: list[tuple[int, str, float]] = []
    for role, text, weight in parts:
        header = [START, *map(ord, f"{role}\n")]
        body = [*map(ord, text), END, ord("\n")]
        ids += header + body
        spans += [(len(header), role, 0.0), (len(body), role, weight)]
    return SimpleNamespace(input_ids=ids, spans=spans, turns_dropped=0)


def sample_of(*parts: tuple[str, str, float], where: str = "a.json:1") -> Sample:
    return show_sample(where, "a.json", encode(*parts), decode, CONTROLS)


def report_of(*parts: tuple[str, str, float], where: str = "a.json:1", name: str = "a.json", **run: Any) -> DataReport:
    report = DataReport("train", ReportSettings(**run))
    source = report.add_source(name, "messages", 1)
    source.keep(where, encode(*parts))
    report.add_sample(sample_of(*parts, where=where))
    report.finish()
    return report


CHAT = (("user", "Hi", 0.0), ("assistant", "Hello!\nYou there?", 1.0))


def text_of(pieces: Sequence[SamplePiece]) -> str:
    return "".join(piece.text for piece in pieces)


# Samples


def test_a_sample_says_whose_each_token_is() -> None:
    assert shorten(sample_of(*CHAT).pieces, 1000) == [
        SamplePiece("<|im_start|>", "user", 0.0, 1, "control"),
        SamplePiece("user\nHi", "user", 0.0, 7),
        SamplePiece("<|im_end|>", "user", 0.0, 1, "control"),
        SamplePiece("\n", "user", 0.0, 1),
        SamplePiece("<|im_start|>", "assistant", 0.0, 1, "control"),
        SamplePiece("assistant\n", "assistant", 0.0, 10),
        SamplePiece("Hello!\nYou there?", "assistant", 1.0, 17),
        SamplePiece("<|im_end|>", "assistant", 1.0, 1, "control"),
        SamplePiece("\n", "assistant", 1.0, 1),
    ]
    assert (sample_of(*CHAT).tokens, sample_of(*CHAT).trained_tokens) == (40, 19)


def test_the_first_token_is_never_trained() -> None:
    encoded = SimpleNamespace(input_ids=[ord("a"), ord("b")], spans=[(2, "assistant", 1.0)], turns_dropped=0)
    assert show_sample("a:1", "a", encoded, decode).pieces == (
        SamplePiece("a", "assistant", 0.0, 1),
        SamplePiece("b", "assistant", 1.0, 1),
    )


def test_the_first_samples_are_kept() -> None:
    report = DataReport("train", most_samples=2)
    for line in (1, 2, 3):
        assert report.wants_samples == (line < 3)
        report.add_sample(sample_of(*CHAT, where=f"a.json:{line}"))
    assert [sample.where for sample in report.samples] == ["a.json:1", "a.json:2"]


def test_characters_of_several_tokens_stay_whole() -> None:
    text = "é你👍" * 50

    def decode_bytes(ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")

    ids = list(text.encode())
    encoded = SimpleNamespace(input_ids=ids, spans=[(len(ids), "user", 0.0)], turns_dropped=0)
    sample = show_sample("a:1", "a", encoded, decode_bytes)
    assert len(sample.pieces) > 20
    assert text_of(sample.pieces) == text
    assert sample.tokens == len(ids)


def test_a_long_answer_loses_its_middle() -> None:
    text = "".join(chr(0x4E00 + index) for index in range(5000))
    pieces = shorten(sample_of(("user", "Hi", 0.0), ("assistant", text, 1.0)).pieces, 300)
    gaps = [piece for piece in pieces if piece.kind == "gap"]
    assert [(gap.role, gap.weight) for gap in gaps] == [("assistant", 1.0)]
    shown = sum(piece.tokens for piece in pieces if piece.kind != "gap")
    assert 150 < shown <= 300
    assert shown + gaps[0].tokens == 5000 + 23
    before, after = (pieces[pieces.index(gaps[0]) + step].text for step in (-1, 1))
    assert (before, after) == (text[: len(before)], text[-len(after) :])
    assert text_of(pieces[-2:]) == "<|im_end|>\n"


def test_both_ends_of_every_answer_stay_while_there_is_room() -> None:
    parts = [("assistant", f"begin{index}" + "x" * 400 + f"end{index}", 1.0) for index in range(5)]
    shown = text_of(shorten(sample_of(*parts).pieces, 500))
    for index in range(5):
        assert f"begin{index}x" in shown
        assert f"xend{index}<|im_end|>\n" in shown


def test_of_hundreds_of_turns_the_first_and_the_last_stay() -> None:
    parts = [("assistant" if index % 2 else "user", f"turn {index}.", float(index % 2)) for index in range(400)]
    sample = sample_of(*parts)
    pieces = shorten(sample.pieces, 300)
    gaps = [piece for piece in pieces if piece.kind == "gap"]
    assert [(gap.role, gap.weight) for gap in gaps] == [("", 0.0)]
    assert sum(piece.tokens for piece in pieces) == sample.tokens
    assert sample.tokens - 300 <= gaps[0].tokens < sample.tokens - 200
    assert text_of(pieces).startswith("<|im_start|>user\nturn 0.<|im_end|>\n")
    assert text_of(pieces).endswith("turn 399.<|im_end|>\n")


def test_five_megabytes_in_one_line() -> None:
    report = report_of(("user", "\x1b<" * 2_500_000, 0.0), ("assistant", "Hello", 1.0))
    assert sum(len(piece.text) for piece in report.samples[0].pieces) < 50_000
    begun = time.process_time()
    text, page = render_report(report, color=False), render_html([report])
    assert time.process_time() - begun < 10
    assert len(text) < 20_000
    assert len(page) < 200_000
    assert "tokens left out" in text
    assert "tokens left out" in page
    assert "\x1b" not in text + page


# Characters


def test_stand_ins() -> None:
    assert visible("a\n\tb") == "a\n\tb"
    assert visible("\x00\x1b[2J\r\x7f\x85\x9b") == "␀␛[2J␍␡\\x85\\x9b"
    assert visible("\u202a\u202e\u2066\u2069\u200e\u061c\u2028") == "\\u202a\\u202e\\u2066\\u2069\\u200e\\u061c\\u2028"
    assert visible("\ud800x\udfff") == "\\ud800x\\udfff"
    assert visible("你好 👩‍👩‍👧 عربي é") == "你好 👩‍👩‍👧 عربي é"
    assert visible_line("a\nb\tc") == "a␊b␉c"
    assert visible_line("x" * 300 + ":12", 20) == "x" * 10 + "…" + "x" * 6 + ":12"
    assert len(visible_line("x" * 300 + ":12", 20)) == 20


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_whatever_is_shown_is_visible_and_valid(text: str) -> None:
    shown = visible(text)
    shown.encode()
    assert visible(shown) == shown
    hidden = [*range(0x09), *range(0x0B, 0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
    assert not {chr(code) for code in hidden} & set(shown)


# In a terminal


def test_a_sample_without_colour() -> None:
    lines = render_report(report_of(*CHAT), color=False, width=60).splitlines()
    assert lines[:4] == [
        "What is trained",
        "───────────────",
        "--label_mask assistant, --truncation turns,",
        "--model_max_length 8192",
    ]
    start = lines.index("Sample 1 of 1: a.json:1")
    assert lines[start - 2 : start + 10] == [
        "⟦trained⟧, not trained; ↵ line end",
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


def test_a_sample_in_colour() -> None:
    text = render_report(report_of(*CHAT), color=True, width=60)
    assert "\x1b[32mHello!↵\x1b[0m\n" in text
    assert "\x1b[32mYou there?\x1b[0m\x1b[2m\x1b[32m<|im_end|>\x1b[0m\x1b[32m↵\x1b[0m\n" in text
    assert " Hi\x1b[2m<|im_end|>\x1b[0m↵\n" in text
    assert "⟦" not in text
    plain = render_report(report_of(*CHAT), color=False, width=60)
    assert OURS.sub("", text) == plain.replace("⟦", "").replace("⟧", "")


def test_weights_and_text_that_looks_like_a_control_token() -> None:
    report = report_of(("user", "a <|im_end|> b", 0.0), ("assistant", "Yes", 0.5), ("tool", "No", 2.0))
    text = render_report(report, color=False)
    assert "a <\\|im_end|> b<|im_end|>↵" in text
    assert "⟦(x0.5) Yes<|im_end|>↵⟧" in text
    assert "⟦(x2) No<|im_end|>↵⟧" in text
    legend = "⟦trained⟧, not trained; ↵ line end; (x0.5) weight in the loss, where it is not 1; <\\| in a message"
    assert legend in text
    assert "Their weights in the loss add up to 10.5." in text


def test_lines_are_as_wide_as_they_look() -> None:
    # 48 columns are left: 24 Chinese characters, or 48 letters, accents and joiners for free.
    for letter, count in (("你", 24), ("x", 48), ("e\u0301", 48)):
        lines = render_report(report_of(("user", letter * 60, 0.0)), color=False, width=60).splitlines()
        assert f"          │ {letter * count}" in lines
    lines = render_report(report_of(("user", "word " * 20, 0.0)), color=False, width=60).splitlines()
    assert "          │ " + ("word " * 9).rstrip() in lines


def test_the_whole_table() -> None:
    report = DataReport("train", ReportSettings("m", "qwen_v1", "last", "cut", 100, 2, 4, 2, 3))
    a, b = report.add_source("a.json#2", "alpaca", 1200), report.add_source("b.jsonl@x5", "messages", 9)
    a.keep("a.json:1", encode(*CHAT))
    a.skip("a.json:7", "no answer fits")
    b.keep("b.jsonl:1", encode(("user", "Hi", 0.0), ("assistant", "Hi", 1.0)), times=5, truncated="cut")
    text = render_report(report, color=False, width=90)
    assert "m (qwen_v1): --label_mask last, --truncation cut, --model_max_length 100\n" in text
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
        "Tokens of a sample",
        "──────────────────",
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
        "Padding, of all that is computed in batches of 2",
        "────────────────────────────────────────────────",
        "fixed     72.5%  ██████████████████████░░░░░░░░  all padded to --model_max_length",
        "dynamic    8.3%  ███░░░░░░░░░░░░░░░░░░░░░░░░░░░  this run: random batches padded to their longest",
        "grouped    8.3%  ███░░░░░░░░░░░░░░░░░░░░░░░░░░░  batches of similar lengths",
        "",
        "Optimizer steps",
        "───────────────",
        "1 per epoch, 3 in all (3 epochs). A step takes 16 samples: 2 per device x 4 accumulated x",
        "2 devices.",
        "",
        "warning: a.json#2: skipped 1 of 2 conversations, no answer fits: a.json:7",
        "warning: b.jsonl@x5: shortened 5 of 5 conversations, cut: b.jsonl:1",
        "warning: a step takes 16 samples, but there are 6: an epoch is one step",
    ]


def test_a_narrow_terminal() -> None:
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


def test_problems_stand_last_and_in_red() -> None:
    report = DataReport("train")
    report.add_source("a.json", "alpaca", 1).skip("a.json:1", "bad record")
    text = render_report(report, color=True)
    end = "\x1b[31mPROBLEM\x1b[0m: nothing is left of 1 conversations: 1 skipped, bad record\n"
    assert text.endswith(end)
    assert "\x1b[33mwarning\x1b[0m: a.json: skipped 1 of 1 conversations, bad record: a.json:1\n" in text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_who_wants_colour(monkeypatch: pytest.MonkeyPatch) -> None:
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


def evil_report() -> DataReport:
    report = report_of(
        ("user", EVIL, 0.0),
        (EVIL, EVIL, 0.5),
        ("assistant", EVIL, 1.0),
        where=f"{EVIL}:3",
        name=EVIL,
        model=EVIL,
        family=EVIL,
        label_mask=EVIL,
        truncation=EVIL,
    )
    report.sources[0].format = EVIL
    report.sources[0].skip(f"{EVIL}:4", EVIL)
    report.sources[0].keep(f"{EVIL}:5", encode(("assistant", EVIL, 1.0)), [EVIL], truncated=EVIL)
    report.finish()
    return report


@pytest.mark.parametrize("color", [False, True])
@pytest.mark.parametrize("width", [60, 100])
def test_no_data_steers_the_terminal(color: bool, width: int) -> None:
    text = render_report(evil_report(), color=color, width=width)
    text.encode()
    plain = OURS.sub("", text) if color else text
    assert not [char for char in plain if not char.isprintable() and char != "\n"]
    assert visible(plain) == plain
    # Marks in a message are no marks of ours: each turn that is trained has its own pair.
    sample = plain[plain.index(" trained\n\n") : plain.index("\nData (train)")]
    assert sample.count("⟦") == sample.count("⟧") == (0 if color else 2)
    assert sample.count("⋯") == 2 * sample.replace("\n", " ").count("left out") > 0
    # The messages, and the role that stands in a header as well.
    joined = re.sub(r"\n.{10}[┃│] ", "", sample)
    assert joined.count("\\u27e6fake\\u27e7\\u21b5\\u21e5\\u22ef <\\|im_end|>⇥   tab") == 4


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text(), st.sampled_from([0.0, 1.0, 0.25]))))
@settings(max_examples=100, deadline=None)
def test_any_text_can_be_shown(parts: list[tuple[str, str, float]]) -> None:
    report = report_of(*parts)
    for color in (False, True):
        plain = OURS.sub("", render_report(report, color=color, width=60))
        plain.encode()
        assert visible(plain) == plain
    render_html([report]).encode()


# As a page


class Page(HTMLParser):
    """Elements with their attributes, and the text outside of the style sheet. Wrong nesting is an error."""

    VOID = ("meta", "line", "rect")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


TAGS = set(
    "html head meta title style body main h1 h2 h3 p div strong ul ol li span b i code article header small figure "
    "figcaption svg text line rect table tr th td details summary".split()
)
ATTRIBUTES = set(
    "lang charset http-equiv content name class style viewbox role aria-label x y x1 x2 y1 y2 width height "
    "text-anchor".split()
)


@pytest.mark.parametrize("make", [evil_report, lambda: report_of(*CHAT), lambda: DataReport("eval")])
def test_the_page_is_whole_and_asks_for_nothing(make: Any) -> None:
    html = render_html([make()])
    html.encode()
    page = Page(html)
    assert {tag for tag, _ in page.elements} <= TAGS
    assert {name for _, attributes in page.elements for name in attributes} <= ATTRIBUTES
    assert page.count("script") == 0
    assert not re.search(r"https?:|url\(|@import|src=|href=|\$\{?[a-z]", re.sub(r"\$(body|\{title\})", "", html))
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": policy}) in page.elements
    assert ("meta", {"charset": "utf-8"}) in page.elements
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html


def test_evil_text_is_only_text() -> None:
    report = evil_report()
    html = render_html([report])
    assert "<script" not in html
    assert visible(html) == html
    page = Page(html)
    styles = {attributes["style"] for _, attributes in page.elements if "style" in attributes}
    assert all(re.fullmatch(r"width:\d+\.\d%", style or "") for style in styles)
    # Everything of it is there to be read: three messages, and a role in its header.
    assert "".join(page.text).count(visible(EVIL)) == 4


def test_what_is_trained_is_marked_on_the_page() -> None:
    html = render_html([report_of(*CHAT, ("user", "\n", 0.0), ("assistant", "<b>", 0.25))])
    end, line = '<span class="c">&lt;|im_end|&gt;</span>', '<span class="n">↵</span>\n'
    assert f'<span class="t">Hello!{line}You there?{end}{line}</span>' in html
    assert f'<span class="t"><span class="w">×0.25</span>&lt;b&gt;{end}{line}</span>' in html
    assert f'<div class="said"><span class="c">&lt;|im_start|&gt;</span>user{line}Hi{end}{line}</div>' in html
    assert "<h3>a.json:1</h3>" in html


def test_the_histograms_count_every_sample() -> None:
    report = DataReport("train", ReportSettings(model_max_length=9000))
    source = report.add_source("a.json", "alpaca", 500)
    for number in range(499):
        source.keep("a:1", encode(("assistant", "x" * (number % 90), 1.0)))
    source.keep("a:2", encode(("assistant", "x" * 8000, 1.0)))
    html = render_html([report])
    bars = re.findall(r"<title>[\d,]+ to [\d,]+ tokens: ([\d,]+) samples</title>", html)
    assert sum(int(count.replace(",", "")) for count in bars) == 2 * 500
    assert html.count("1 longer ones, up to 8,013, stand in the last bar.") == 1
    assert html.count("1 longer ones, up to 8,002, stand in the last bar.") == 1
    assert ">tokens of a sample</text>" in html
    assert ">trained tokens of a sample</text>" in html


def test_problems_stand_first_and_every_place_is_there() -> None:
    report = DataReport("train")
    source = report.add_source("a.json", "alpaca", 30)
    for line in range(30):
        source.skip(f"a.json:{line}", "bad record")
    html = render_html([report])
    assert html.index("This run would be worthless") < html.index('class="tiles"') < html.index("1 warning")
    assert html.count("<li>a.json:") == 30 + 1
    assert "No problems found." not in html
    assert "No problems found." in render_html([report_of(*CHAT, batch_size=1)])


def test_a_page_of_two_sets() -> None:
    evaluated = DataReport("eval")
    evaluated.add_source("b.json", "pairs", 1).keep("b.json:1", encode(*CHAT))
    html = render_html([report_of(*CHAT), evaluated])
    assert "<title>Data report: training data and evaluation data</title>" in html
    assert html.index("<h1>Training data</h1>") < html.index('<h1 class="next">Evaluation data</h1>')
    assert html.count("<h2>Optimizer steps</h2>") == 1
    Page(html)
