"""A report for the terminal: samples with what is trained in colour (or between marks), then the tables."""

from __future__ import annotations

import os
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple, TextIO

from data_utils.report.data_report import DataReport
from data_utils.report.samples import Sample, SamplePiece, shorten, visible, visible_line
from data_utils.report.source_report import SourceReport

_SHOWN_TOKENS = 500
_GUTTER = 12
_BAR = 30

_TRAINED, _DIM, _BOLD, _RED, _YELLOW, _RESET = "\x1b[32m", "\x1b[2m", "\x1b[1m", "\x1b[31m", "\x1b[33m", "\x1b[0m"
_OPEN, _CLOSE, _NEWLINE, _TAB, _GAP = "⟦", "⟧", "↵", "⇥", "⋯"
# What a message may hold itself and would be taken for ours.
_OUR_MARKS = str.maketrans({mark: f"\\u{ord(mark):04x}" for mark in (_OPEN, _CLOSE, _NEWLINE, _TAB, _GAP)})

BATCHING = {
    "fixed": "all padded to --model_max_length",
    "dynamic": "random batches padded to their longest",
    "grouped": "batches of similar lengths",
}


def wants_color(stream: TextIO) -> bool:
    """Whether to colour what goes to a stream: a terminal whose user has not set NO_COLOR."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def render_report(report: DataReport, *, color: bool, width: int = 100) -> str:
    """The report as text of at most ``width`` columns, apart from single words that are longer; 60 are enough.

    Nothing of the user's text reaches the terminal as anything but visible characters.
    """
    paint = _Paint(color)
    width = max(width, 40)
    parts = [_what_is_trained(report, paint, width)]
    for number, sample in enumerate(report.samples, 1):
        parts.append(_sample(sample, f"Sample {number} of {len(report.samples)}", paint, width))
    total = report.total()
    parts.append(_sources(report, total, paint, width))
    if total.kept:
        parts += [_lengths(total, paint, width), _roles(total, paint, width), _padding(report, paint, width)]
    if total.kept and report.name == "train":
        parts.append([*_heading("Optimizer steps", paint, width), *_wrap(steps_text(report), width)])
    parts.append(_verdict(report, paint, width))
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


class _Paint:
    """Puts text in colour, or leaves it as it is."""

    def __init__(self, color: bool) -> None:
        self.color = color

    def __call__(self, style: str, text: str) -> str:
        return f"{style}{text}{_RESET}" if self.color and style and text.strip() else text


class _Cell(NamedTuple):
    text: str
    style: str
    is_trained: bool


def _what_is_trained(report: DataReport, paint: _Paint, width: int) -> list[str]:
    settings, samples = report.settings, report.samples
    checkpoint = f"{visible_line(settings.model)} ({settings.family}): " if settings.model else ""
    lines = _wrap(visible_line(checkpoint + settings.flags(", "), 400), width)
    if samples:
        lines += ["", *_wrap(_legend(samples, paint), width)]
    return [*_heading("What is trained", paint, width), *lines]


def _legend(samples: Iterable[Sample], paint: _Paint) -> str:
    example = paint(_TRAINED, "trained") if paint.color else f"{_OPEN}trained{_CLOSE}"
    words = [f"{example}, not trained", f"{_NEWLINE} line end"]
    pieces = [piece for sample in samples for piece in sample.pieces]
    if any(piece.weight not in (0, 1) for piece in pieces):
        words.append("(x0.5) weight in the loss, where it is not 1")
    if any("<|" in piece.text for piece in pieces if piece.kind == "text"):
        words.append("<\\| in a message is text, no control token")
    return "; ".join(words)


def _sample(sample: Sample, title: str, paint: _Paint, width: int) -> list[str]:
    counts = f"{sample.tokens:,} tokens, {sample.trained_tokens:,} trained"
    lines = _heading(f"{title}: {visible_line(sample.where)}", paint, width)
    lines += [paint(_DIM, counts), ""]
    for role, pieces in groupby(shorten(sample.pieces, _SHOWN_TOKENS), key=lambda piece: piece.role):
        label = f"{visible_line(role, _GUTTER - 2):<{_GUTTER - 2}}"
        for cells in _wrapped(_cells(list(pieces), paint.color), width - _GUTTER):
            bar = paint(_TRAINED, "┃") if any(cell.is_trained for cell in cells) else paint(_DIM, "│")
            text = "".join(
                paint(style, "".join(cell.text for cell in run))
                for style, run in groupby(cells, key=lambda cell: cell.style)
            )
            lines.append(f"{paint(_BOLD, label)}{bar} {text}".rstrip(" "))
            label = " " * (_GUTTER - 2)
    return lines


def _cells(pieces: Sequence[SamplePiece], color: bool) -> list[_Cell]:
    """Characters with their style. Without colour marks stand around each run of one weight that is trained."""
    cells: list[_Cell] = []
    for weight, run in groupby(pieces, key=lambda piece: piece.weight):
        trained = weight > 0
        marks = (_OPEN, _CLOSE) if trained and not color else ("", "")
        note = f"(x{weight:g}) " if trained and weight != 1 else ""
        cells += [_Cell(char, _DIM, trained) for char in marks[0] + note]
        for piece in run:
            style = _TRAINED if trained else ""
            if piece.kind != "text":
                style = _DIM + style
            cells += [_Cell(char, style, trained) for char in _text(piece)]
        # The mark closes a trained line end on its line.
        place = len(cells) - (cells[-1].text == "\n")
        cells[place:place] = [_Cell(char, _DIM, trained) for char in marks[1]]
    return cells


def _text(piece: SamplePiece) -> str:
    if piece.kind == "gap":
        return f" {_GAP} {piece.tokens:,} tokens left out {_GAP} "
    text = visible(piece.text.translate(_OUR_MARKS))
    if piece.kind == "text":
        text = text.replace("<|", "<\\|")
    return text.replace("\n", f"{_NEWLINE}\n").replace("\t", f"{_TAB}   ")


def _wrapped(cells: Iterable[_Cell], width: int) -> list[list[_Cell]]:
    """Lines of at most ``width`` columns, parted at line ends, after spaces where there are any, else anywhere."""
    lines: list[list[_Cell]] = [[]]
    used = space = 0  # columns of the last line, and its cells up to its last space
    for cell in cells:
        if cell.text == "\n":
            lines.append([])
            used = space = 0
            continue
        columns = _columns(cell.text)
        if used + columns > width:
            line, rest = (lines[-1][:space], lines[-1][space:]) if space else (lines[-1], [])
            lines[-1:] = [line, rest]
            used, space = sum(_columns(each.text) for each in rest), 0
        lines[-1].append(cell)
        used += columns
        if cell.text == " ":
            space = len(lines[-1])
    return lines if lines[-1] else lines[:-1]


def _columns(text: str) -> int:
    """Columns of a terminal: two for a Chinese character, none for an accent that joins the letter before it."""
    return sum(
        0 if unicodedata.category(char) in ("Mn", "Me", "Cf") else 1 + (unicodedata.east_asian_width(char) in "WF")
        for char in text
    )


def _heading(title: str, paint: _Paint, width: int) -> list[str]:
    lines = _wrap(title, width)
    return [*(paint(_BOLD, line) for line in lines), paint(_DIM, "─" * min(width, max(map(_columns, lines))))]


def _wrap(text: str, width: int, indent: str = "") -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False) or [""]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of numbers under their heads, all lines equally long."""
    sizes = [max(len(row[column]) for row in (heads, *rows)) for column in range(len(heads))]
    return ["  ".join(f"{value:>{size}}" for value, size in zip(row, sizes, strict=True)) for row in (heads, *rows)]


def _sources(report: DataReport, total: SourceReport, paint: _Paint, width: int) -> list[str]:
    lines = _heading(f"Data ({visible_line(report.name)})", paint, width)
    reports = [*report.sources, *([total] if len(report.sources) != 1 else [])]
    heads = ("in file", "read", "kept", "skipped", "shortened", "duplicates", "tokens", "trained")
    names = [f"{visible_line(each.name)} ({visible_line(each.format)})" for each in report.sources] + ["all"]
    rows = []
    for source_report in reports:
        counts = (
            source_report.in_file,
            source_report.read,
            source_report.kept,
            source_report.skipped.total,
            source_report.truncated.total,
        )
        numbers = (*counts, source_report.duplicates.total, source_report.tokens)
        rows.append(
            (*(f"{number:,}" for number in numbers), _share(source_report.trained_tokens, source_report.tokens))
        )
    table = _table(heads, rows)
    if fits := len(table[0]) <= width:
        lines.append(paint(_DIM, table[0]))
    for name, row, line in zip(names, rows, table[1:], strict=False):
        lines += _wrap(name, width)
        lines += [line] if fits else _pairs(heads, row, width)
    return lines


def _pairs(heads: Sequence[str], row: Sequence[str], width: int) -> list[str]:
    """``300 read, 287 kept`` and so on, where there is no room for a table."""
    # No line ends between a number and what it counts.
    pairs = ", ".join(f"{value} {head}".replace(" ", "\u00a0") for head, value in zip(heads, row, strict=True))
    return [line.replace("\u00a0", " ") for line in _wrap(f"  {pairs}", width, "  ")]


def _lengths(total: SourceReport, paint: _Paint, width: int) -> list[str]:
    summary = {name: f"{value:,}" for name, value in total.length_summary().items()}
    size = max(map(len, [*summary, *summary.values()]))
    lines = _heading("Tokens of a sample", paint, width)
    names = list(summary)
    most = max(1, width // (size + 2))
    for start in range(0, len(names), most):
        row = names[start : start + most]
        lines.append(paint(_DIM, "  ".join(f"{name:>{size}}" for name in row)))
        lines.append("  ".join(f"{summary[name]:>{size}}" for name in row))
    return lines


def _roles(total: SourceReport, paint: _Paint, width: int) -> list[str]:
    roles = [*sorted(total.tokens_by_role), "all"]
    counts = [(total.tokens_by_role[role], total.trained_by_role[role]) for role in roles[:-1]]
    counts.append((total.tokens, total.trained_tokens))
    rows = [
        (f"{tokens:,}", f"{trained:,}", _share(trained, tokens), _share(trained, total.trained_tokens))
        for tokens, trained in counts
    ]
    table = _table(("tokens", "trained", "share", "of all trained"), rows)
    named = [f"{line}  {visible_line(role, 20)}" for line, role in zip(table[1:], roles, strict=True)]
    lines = [*_heading("Trained tokens by role", paint, width), paint(_DIM, table[0]), *named]
    if total.trained_weight != total.trained_tokens:
        lines.append(f"Their weights in the loss add up to {total.trained_weight:,.6g}.")
    return lines


def _padding(report: DataReport, paint: _Paint, width: int) -> list[str]:
    settings = report.settings
    lines = _heading(f"Padding, of all that is computed in batches of {settings.batch_size}", paint, width)
    bar = min(_BAR, width - 24)
    for way, share in report.padding().items():
        drawn = "█" * round(share * bar)
        note = "this run: " if way == settings.batching else ""
        if width >= 60 + bar:
            note += BATCHING[way]
        line = f"{way:<8}{share:>7.1%}  {paint(_YELLOW, drawn)}{paint(_DIM, '░' * (bar - len(drawn)))}"
        lines.append(f"{line}  {note}".rstrip(" :"))
    return lines


def steps_text(report: DataReport) -> str:
    """How many steps, and what one of them takes, in a sentence or two."""
    settings = report.settings
    per_epoch, steps = report.steps()
    epochs = "1 epoch" if settings.epochs == 1 else f"{settings.epochs:g} epochs"
    reason = f"--max_steps {settings.max_steps}" if settings.max_steps > 0 else epochs
    devices = "1 device" if settings.world_size == 1 else f"{settings.world_size:,} devices"
    sizes = f"{settings.batch_size} per device x {settings.accumulation} accumulated x {devices}"
    takes = f"A step takes {report.samples_per_step:,} samples: {sizes}."
    return f"{per_epoch:,} per epoch, {steps:,} in all ({reason}). {takes}"


def _verdict(report: DataReport, paint: _Paint, width: int) -> list[str]:
    problems, warnings = report.problems(), report.warnings()
    if not problems and not warnings:
        return ["No problems found."]
    lines = []
    for style, name, texts in ((_YELLOW, "warning", warnings), (_RED, "PROBLEM", problems)):
        for text in texts:
            first, *more = _wrap(f"{name}: {visible(text)}".replace("\n", " "), width, "  ")
            lines += [paint(style, first[: len(name)]) + first[len(name) :], *more]
    return lines


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"
