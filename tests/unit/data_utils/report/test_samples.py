"""Samples to show: pieces, shortening, and text made visible."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from console import visible
from data_utils.report.data_report import DataReport
from data_utils.report.page import render_html
from data_utils.report.samples import SamplePiece, build_sample, shorten, visible_line
from data_utils.report.terminal import render_report
from tests.reports import CHAT, decode, report_of, sample_of


def text_of(pieces: Sequence[SamplePiece]) -> str:
    return "".join(piece.text for piece in pieces)


def test_pieces_have_role_weight_and_kind() -> None:
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


def test_first_token_is_not_trained() -> None:
    encoded = SimpleNamespace(input_ids=[ord("a"), ord("b")], spans=[(2, "assistant", 1.0)], turns_dropped=0)
    assert build_sample("a:1", "a", encoded, decode).pieces == (
        SamplePiece("a", "assistant", 0.0, 1),
        SamplePiece("b", "assistant", 1.0, 1),
    )


@pytest.mark.parametrize(
    ("lines", "shown"), [((1, 2, 3, 4), (1, 2, 3)), ((1, 1, 1, 1, 2, 2, 3, 4), (1, 2, 3)), ((1, 1, 1, 1, 2), (1, 1, 2))]
)
def test_report_keeps_samples_of_the_first_records(lines: tuple[int, ...], shown: tuple[int, ...]) -> None:
    """One of each record, and more only if there are too few records."""
    report = DataReport("train", max_samples=3)
    for line in lines:
        report.add_sample(sample_of(*CHAT, where=f"a.json:{line}"))
    assert [sample.where for sample in report.samples] == [f"a.json:{line}" for line in shown]
    assert report.accepts_samples == (len(set(shown)) < 3) and not report.accepts("a.json:1")


def test_characters_of_several_tokens_are_not_split() -> None:
    text = "é你👍" * 50

    def decode_bytes(ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")

    ids = list(text.encode())
    encoded = SimpleNamespace(input_ids=ids, spans=[(len(ids), "user", 0.0)], turns_dropped=0)
    sample = build_sample("a:1", "a", encoded, decode_bytes)
    assert len(sample.pieces) > 20
    assert text_of(sample.pieces) == text
    assert sample.tokens == len(ids)


def test_middle_of_a_long_answer_is_left_out() -> None:
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


def test_both_ends_of_every_answer_are_shown_if_they_fit() -> None:
    parts = [("assistant", f"begin{index}" + "x" * 400 + f"end{index}", 1.0) for index in range(5)]
    shown = text_of(shorten(sample_of(*parts).pieces, 500))
    for index in range(5):
        assert f"begin{index}x" in shown
        assert f"xend{index}<|im_end|>\n" in shown


def test_first_and_last_of_hundreds_of_turns_are_shown() -> None:
    parts = [("assistant" if index % 2 else "user", f"turn {index}.", float(index % 2)) for index in range(400)]
    sample = sample_of(*parts)
    pieces = shorten(sample.pieces, 300)
    gaps = [piece for piece in pieces if piece.kind == "gap"]
    assert [(gap.role, gap.weight) for gap in gaps] == [("", 0.0)]
    assert sum(piece.tokens for piece in pieces) == sample.tokens
    assert sample.tokens - 300 <= gaps[0].tokens < sample.tokens - 200
    assert text_of(pieces).startswith("<|im_start|>user\nturn 0.<|im_end|>\n")
    assert text_of(pieces).endswith("turn 399.<|im_end|>\n")


def test_sample_of_five_megabytes_is_rendered_quickly() -> None:
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


def test_control_characters_are_replaced() -> None:
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
def test_visible_text_is_valid_utf8_without_control_characters(text: str) -> None:
    shown = visible(text)
    shown.encode()
    assert visible(shown) == shown
    hidden = [*range(0x09), *range(0x0B, 0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
    assert not {chr(code) for code in hidden} & set(shown)
