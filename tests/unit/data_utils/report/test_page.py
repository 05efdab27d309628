"""A data report as a web page."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest

from console import visible
from data_utils.report.data_report import DataReport, ReportSettings
from data_utils.report.page import render_html
from tests.reports import CHAT, HOSTILE, encode, hostile_report, report_of


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


@pytest.mark.parametrize("make", [hostile_report, lambda: report_of(*CHAT), lambda: DataReport("eval")])
def test_page_is_well_formed_and_self_contained(make: Any) -> None:
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


def test_hostile_text_is_escaped() -> None:
    report = hostile_report()
    html = render_html([report])
    assert "<script" not in html
    assert visible(html) == html
    page = Page(html)
    styles = {attributes["style"] for _, attributes in page.elements if "style" in attributes}
    assert all(re.fullmatch(r"width:\d+\.\d%", style or "") for style in styles)
    # Everything of it is there to be read: three messages, and a role in its header.
    assert "".join(page.text).count(visible(HOSTILE)) == 4


def test_trained_tokens_are_marked() -> None:
    html = render_html([report_of(*CHAT, ("user", "\n", 0.0), ("assistant", "<b>", 0.25))])
    end, line = '<span class="c">&lt;|im_end|&gt;</span>', '<span class="n">↵</span>\n'
    assert f'<span class="t">Hello!{line}You there?{end}{line}</span>' in html
    assert f'<span class="t"><span class="w">×0.25</span>&lt;b&gt;{end}{line}</span>' in html
    assert f'<div class="content"><span class="c">&lt;|im_start|&gt;</span>user{line}Hi{end}{line}</div>' in html
    assert "<h3>a.json:1</h3>" in html


def test_histograms_count_every_sample() -> None:
    report = DataReport("train", ReportSettings(model_max_length=9000))
    source = report.add_source("a.json", "alpaca", 500)
    for number in range(499):
        source.keep("a:1", encode(("assistant", "x" * (number % 90), 1.0)))
    source.keep("a:2", encode(("assistant", "x" * 8000, 1.0)))
    html = render_html([report])
    bars = re.findall(r"<title>[\d,]+ to [\d,]+ tokens: ([\d,]+) samples</title>", html)
    assert sum(int(count.replace(",", "")) for count in bars) == 2 * 500
    assert html.count("1 longer ones, up to 8,013, are counted in the last bar.") == 1
    assert html.count("1 longer ones, up to 8,002, are counted in the last bar.") == 1
    assert ">tokens per sample</text>" in html
    assert ">trained tokens per sample</text>" in html


def test_problems_come_first_and_every_location_is_listed() -> None:
    report = DataReport("train")
    source = report.add_source("a.json", "alpaca", 30)
    for line in range(30):
        source.skip(f"a.json:{line}", "bad record")
    html = render_html([report])
    assert html.index("This run would be worthless") < html.index('class="tiles"') < html.index("1 warning")
    assert html.count("<li>a.json:") == 30 + 1
    assert "No problems found." not in html
    assert "No problems found." in render_html([report_of(*CHAT, batch_size=1)])


def test_page_of_two_sets() -> None:
    evaluated = DataReport("eval")
    evaluated.add_source("b.json", "pairs", 1).keep("b.json:1", encode(*CHAT))
    html = render_html([report_of(*CHAT), evaluated])
    assert "<title>Data report: training data and evaluation data</title>" in html
    assert html.index("<h1>Training data</h1>") < html.index('<h1 class="next">Evaluation data</h1>')
    assert html.count("<h2>Optimizer steps</h2>") == 1
    Page(html)
