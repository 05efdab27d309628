"""Encoded conversations and data reports for tests."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from data_utils.report.data_report import DataReport, ReportSettings
from data_utils.report.samples import Sample, build_sample

START, END = 0x110000, 0x110001
CONTROLS = {START: "<|im_start|>", END: "<|im_end|>"}
CHAT = (("user", "Hi", 0.0), ("assistant", "Hello!\nYou there?", 1.0))
HOSTILE = (
    "<script>alert(1)</script></style></title>\"'&amp;&#60;b&#62;<!-- $body ${title} {{ body }} {% if %} {# -->"
    "\x1b[31mred\x1b]0;title\x07\x9b1m\x9d\r\x08\x7f\u202eabc\u2066\u2069\u200f\u2028\x85\x00\ud800\udfff"
    "⟦fake⟧↵⇥⋯ <|im_end|>\ttab"
)
"""Markup, escape sequences, bidirectional controls, lone surrogates, and the marks of the reports."""


def spans(*parts: tuple[int, str, float], first_id: int = 0, turns_dropped: int = 0) -> Any:
    """Encode spans of (length, role, weight) as consecutive ids from ``first_id``."""
    length = sum(part[0] for part in parts)
    ids = list(range(first_id, first_id + length))
    return SimpleNamespace(input_ids=ids, spans=list(parts), turns_dropped=turns_dropped)


def exchange(asked: int, answered: int, first_id: int = 0, weight: float = 1.0) -> Any:
    """Encode a user turn and an answer of these lengths."""
    return spans((asked, "user", 0.0), (answered, "assistant", weight), first_id=first_id)


def report_of_lengths(lengths: Sequence[int], **settings: Any) -> DataReport:
    report = DataReport("train", ReportSettings(**settings))
    source = report.add_source("a.jsonl", "messages", len(lengths))
    for number, length in enumerate(lengths, 1):
        source.keep(f"a.jsonl:{number}", exchange(1, length - 1, first_id=number))
    return report


def decode(ids: list[int]) -> str:
    """Decode ids: one id is one character, or one control token."""
    return "".join(CONTROLS.get(id_) or chr(id_) for id_ in ids)


def encode(*turns: tuple[str, str, float]) -> Any:
    """Encode turns of (role, text, weight) with control tokens around each."""
    ids: list[int] = []
    parts: list[tuple[int, str, float]] = []
    for role, text, weight in turns:
        header = [START, *map(ord, f"{role}\n")]
        body = [*map(ord, text), END, ord("\n")]
        ids += header + body
        parts += [(len(header), role, 0.0), (len(body), role, weight)]
    return SimpleNamespace(input_ids=ids, spans=parts, turns_dropped=0)


def sample_of(*turns: tuple[str, str, float], where: str = "a.json:1") -> Sample:
    return build_sample(where, "a.json", encode(*turns), decode, CONTROLS)


def report_of(
    *turns: tuple[str, str, float], where: str = "a.json:1", name: str = "a.json", **settings: Any
) -> DataReport:
    """Build the report of one conversation, with its sample."""
    report = DataReport("train", ReportSettings(**settings))
    source = report.add_source(name, "messages", 1)
    source.keep(where, encode(*turns))
    report.add_sample(sample_of(*turns, where=where))
    report.close()
    return report


def hostile_report() -> DataReport:
    """Build a report with hostile text wherever the user's data, paths or flags appear."""
    report = report_of(
        ("user", HOSTILE, 0.0),
        (HOSTILE, HOSTILE, 0.5),
        ("assistant", HOSTILE, 1.0),
        where=f"{HOSTILE}:3",
        name=HOSTILE,
        model=HOSTILE,
        family=HOSTILE,
        label_mask=HOSTILE,
        truncation=HOSTILE,
    )
    report.sources[0].format = HOSTILE
    report.sources[0].skip(f"{HOSTILE}:4", HOSTILE)
    report.sources[0].keep(f"{HOSTILE}:5", encode(("assistant", HOSTILE, 1.0)), [HOSTILE], truncated=HOSTILE)
    report.close()
    return report
