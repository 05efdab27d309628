"""Text for a terminal: colours, wrapping by columns, headings, and samples with their trained tokens marked."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

from console import visible
from data_utils.report.samples import Sample, SamplePiece, shorten, visible_line

_SHOWN_TOKENS = 500
_GUTTER = 12  # columns left of a sample's text: the role and a bar

TRAINED, DIM, BOLD, RED, YELLOW, _RESET = "\x1b[32m", "\x1b[2m", "\x1b[1m", "\x1b[31m", "\x1b[33m", "\x1b[0m"
OPEN, CLOSE, LINE_END, _TAB, _GAP = "⟦", "⟧", "↵", "⇥", "⋯"
# A message may contain these marks itself.
_ESCAPED_MARKS = str.maketrans({mark: f"\\u{ord(mark):04x}" for mark in (OPEN, CLOSE, LINE_END, _TAB, _GAP)})


class Painter:
    """Add colours to text, or return it unchanged if ``color`` is false."""

    def __init__(self, color: bool) -> None:
        self.color = color

    def __call__(self, style: str, text: str) -> str:
        return f"{style}{text}{_RESET}" if self.color and style and text.strip() else text


def heading(title: str, paint: Painter, width: int) -> list[str]:
    lines = wrap(title, width)
    return [*(paint(BOLD, line) for line in lines), paint(DIM, "─" * min(width, max(map(_columns, lines))))]


def wrap(text: str, width: int, indent: str = "") -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False) or [""]


class _Cell(NamedTuple):
    """A character with its style."""

    text: str
    style: str
    is_trained: bool


def sample_lines(sample: Sample, title: str, paint: Painter, width: int) -> list[str]:
    """Return a sample as lines: role, a bar (bold if the line has trained tokens), and the text."""
    counts = f"{sample.tokens:,} tokens, {sample.trained_tokens:,} trained"
    lines = heading(f"{title}: {visible_line(sample.where)}", paint, width)
    lines += [paint(DIM, counts), ""]
    for role, pieces in groupby(shorten(sample.pieces, _SHOWN_TOKENS), key=lambda piece: piece.role):
        label = f"{visible_line(role, _GUTTER - 2):<{_GUTTER - 2}}"
        for cells in _wrap_cells(_cells(list(pieces), paint.color), width - _GUTTER):
            bar = paint(TRAINED, "┃") if any(cell.is_trained for cell in cells) else paint(DIM, "│")
            text = "".join(
                paint(style, "".join(cell.text for cell in run))
                for style, run in groupby(cells, key=lambda cell: cell.style)
            )
            lines.append(f"{paint(BOLD, label)}{bar} {text}".rstrip(" "))
            label = " " * (_GUTTER - 2)
    return lines


def _cells(pieces: Sequence[SamplePiece], color: bool) -> list[_Cell]:
    """Return the characters of pieces. Without colour, marks enclose each trained run of one weight."""
    cells: list[_Cell] = []
    for weight, run in groupby(pieces, key=lambda piece: piece.weight):
        trained = weight > 0
        marks = (OPEN, CLOSE) if trained and not color else ("", "")
        note = f"(x{weight:g}) " if trained and weight != 1 else ""
        cells += [_Cell(char, DIM, trained) for char in marks[0] + note]
        for piece in run:
            style = TRAINED if trained else ""
            if piece.kind != "text":
                style = DIM + style
            cells += [_Cell(char, style, trained) for char in _piece_text(piece)]
        # The closing mark goes before a final newline, on the same line as the text.
        end = len(cells) - (cells[-1].text == "\n")
        cells[end:end] = [_Cell(char, DIM, trained) for char in marks[1]]
    return cells


def _piece_text(piece: SamplePiece) -> str:
    if piece.kind == "gap":
        return f" {_GAP} {piece.tokens:,} tokens left out {_GAP} "
    text = visible(piece.text.translate(_ESCAPED_MARKS))
    if piece.kind == "text":
        text = text.replace("<|", "<\\|")
    return text.replace("\n", f"{LINE_END}\n").replace("\t", f"{_TAB}   ")


def _wrap_cells(cells: Iterable[_Cell], width: int) -> list[list[_Cell]]:
    """Split cells into lines of at most ``width`` columns: at newlines, else after a space, else anywhere."""
    lines: list[list[_Cell]] = [[]]
    used = after_space = 0  # columns of the last line; its cells up to and including the last space
    for cell in cells:
        if cell.text == "\n":
            lines.append([])
            used = after_space = 0
            continue
        columns = _columns(cell.text)
        if used + columns > width:
            last = lines[-1]
            line, rest = (last[:after_space], last[after_space:]) if after_space else (last, [])
            lines[-1:] = [line, rest]
            used, after_space = sum(_columns(moved.text) for moved in rest), 0
        lines[-1].append(cell)
        used += columns
        if cell.text == " ":
            after_space = len(lines[-1])
    return lines if lines[-1] else lines[:-1]


def _columns(text: str) -> int:
    """Return the columns of text in a terminal: two for a Chinese character, none for a combining accent."""
    return sum(
        0 if unicodedata.category(char) in ("Mn", "Me", "Cf") else 1 + (unicodedata.east_asian_width(char) in "WF")
        for char in text
    )
