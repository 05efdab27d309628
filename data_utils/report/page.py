"""A report as one web page that needs nothing else: no script, no font, no request. It may be sent to a colleague."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from string import Template

from data_utils.report.counts import ReasonCounts
from data_utils.report.data_report import DataReport
from data_utils.report.samples import Sample, SamplePiece, shorten, visible, visible_line
from data_utils.report.source_report import SourceReport
from data_utils.report.terminal import WAYS, steps_text

_TEMPLATE = Path(__file__).with_name("page.html")
_SHOWN_TOKENS = 2000

_SETS = {"train": "Training data", "eval": "Evaluation data"}

# Of a histogram, in units of the drawing, which is about as wide on a phone.
_WIDTH, _HEIGHT = 440, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 46, 44
_BINS = 32


def render_html(reports: Sequence[DataReport]) -> str:
    """One page of one or more sets. Text of the user's data is only ever text in it, and all of it is valid UTF-8."""
    names = " and ".join(_SETS.get(report.name, report.name).lower() for report in reports)
    body = "\n".join(_report(report, number) for number, report in enumerate(reports, 1))
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(title=_line(f"Data report: {names}"), body=body)


def _report(report: DataReport, number: int) -> str:
    total = report.total()
    settings = report.settings
    name = _SETS.get(report.name, report.name)
    checkpoint = f" for {settings.model} ({settings.family})" if settings.model else ""
    flags = (
        f"--label_mask {settings.label_mask} --truncation {settings.truncation} "
        f"--model_max_length {settings.model_max_length}"
    )
    parts = [
        f"<h1>{_line(name)}</h1>" if number == 1 else f'<h1 class="next">{_line(name)}</h1>',
        f'<p class="soft">Data report{_line(checkpoint)}: what is read, what is trained, what batches will hold.</p>',
        f'<p class="flags">{_line(flags)}</p>',
        _problems(report),
        _tiles(report, total),
        _warnings(report),
        _samples(report.samples),
        _sources(report, total),
    ]
    if total.kept:
        parts += [_charts(total, settings.model_max_length), _lengths(total), _roles(total), _padding(report)]
        if report.name == "train":
            parts.append(_steps(report))
    parts.append(_places(report.sources))
    return "\n".join(part for part in parts if part)


def _text(text: str) -> str:
    return html.escape(visible(text))


def _line(text: object) -> str:
    return html.escape(visible_line(text, 300))


def _problems(report: DataReport) -> str:
    problems = report.problems()
    if problems:
        return _box("bad", "This run would be worthless", problems)
    return "" if report.warnings() else '<div class="verdict good"><strong>No problems found.</strong></div>'


def _warnings(report: DataReport) -> str:
    warnings = report.warnings(places=False)
    title = "1 warning" if len(warnings) == 1 else f"{len(warnings)} warnings"
    return _box("doubt", title, warnings) if warnings else ""


def _box(kind: str, title: str, lines: Sequence[str]) -> str:
    items = "".join(f"<li>{_text(line)}</li>" for line in lines)
    return f'<div class="verdict {kind}"><strong>{title}</strong><ul>{items}</ul></div>'


def _tiles(report: DataReport, total: SourceReport) -> str:
    tiles = [
        ("samples", f"{total.kept:,}", f"of {total.read:,} conversations read"),
        ("tokens", _short(total.tokens), f"{total.tokens:,} in an epoch"),
        ("trained", _share(total.trained_tokens, total.tokens), f"{total.trained_tokens:,} tokens"),
    ]
    padding = report.padding()
    if report.settings.batching in padding:
        way = report.settings.batching
        tiles.append(("padding", f"{padding[way]:.1%}", f"of what is computed ({way})"))
    if total.kept and report.name == "train":
        per_epoch, steps = report.steps()
        tiles.append(("steps", f"{steps:,}", f"{per_epoch:,} per epoch"))
    drawn = (
        f'<div class="tile"><span>{name}</span><b>{value}</b><span>{_line(note)}</span></div>'
        for name, value, note in tiles
    )
    return f'<div class="tiles">{"".join(drawn)}</div>'


def _samples(samples: Sequence[Sample]) -> str:
    if not samples:
        return ""
    pieces = [piece for sample in samples for piece in sample.pieces]
    legend = ['<span class="said"><span class="t">trained</span></span>', '<span class="said">not trained</span>']
    if any(piece.kind == "control" for piece in pieces):
        legend.append("<code><i>italic</i></code> control tokens")
    if any(piece.weight not in (0, 1) for piece in pieces):
        legend.append('<span class="said"><span class="t"><span class="w">×0.5</span></span></span> weight in the loss')
    legend.append("<code>↵</code> line end")
    drawn = "".join(_sample(sample) for sample in samples)
    items = "".join(f"<span>{item}</span>" for item in legend)
    return f'<h2>What is trained</h2>\n<div class="legend">{items}</div>\n{drawn}'


def _sample(sample: Sample) -> str:
    turns = "".join(
        f'<div class="turn"><div class="role">{_line(role)}</div><div class="said">{_said(list(pieces))}</div></div>'
        for role, pieces in groupby(shorten(sample.pieces, _SHOWN_TOKENS), key=lambda piece: piece.role)
    )
    counts = f"{sample.tokens:,} tokens, {sample.trained_tokens:,} trained"
    title = f'<header><h3>{_line(sample.where)}</h3><span class="soft">{counts}</span></header>'
    return f'<article class="card sample">{title}<div class="turns">{turns}</div></article>\n'


def _said(pieces: Sequence[SamplePiece]) -> str:
    parts = []
    for weight, run in groupby(pieces, key=lambda piece: piece.weight):
        inner = "".join(map(_piece, run))
        if weight <= 0:
            parts.append(inner)
            continue
        note = "" if weight == 1 else f'<span class="w">×{weight:g}</span>'
        parts.append(f'<span class="t">{note}{inner}</span>')
    return "".join(parts)


def _piece(piece: SamplePiece) -> str:
    if piece.kind == "gap":
        return f'<span class="g">… {piece.tokens:,} tokens left out …</span>'
    text = _text(piece.text).replace("\n", '<span class="n">↵</span>\n')
    return f'<span class="c">{text}</span>' if piece.kind == "control" else text


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], last: str = "") -> str:
    """A table of cells that are HTML already. ``last`` is the class of its last row."""
    made = ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    lines = [f"<tr>{cells}</tr>" for cells in made[:-1]] + [f'<tr class="{last}">{cells}</tr>' for cells in made[-1:]]
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f'<div class="card scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def _sources(report: DataReport, total: SourceReport) -> str:
    heads = (*("source", "in file", "read", "kept", "skipped", "shortened", "duplicates", "tokens", "trained", ""),)
    reports = [*report.sources, *([total] if len(report.sources) != 1 else [])]
    rows = []
    for source_report in reports:
        numbers = (
            source_report.in_file,
            source_report.read,
            source_report.kept,
            source_report.skipped.total,
            source_report.truncated.total,
        )
        name = (
            "all"
            if source_report is total
            else f"{_line(source_report.name)} <small>{_line(source_report.format)}</small>"
        )
        counts = [
            f"{number:,}"
            for number in (*numbers, source_report.duplicates.total, source_report.tokens, source_report.trained_tokens)
        ]
        rows.append([name, *counts, _share(source_report.trained_tokens, source_report.tokens)])
    return f"<h2>Sources</h2>\n{_table(heads, rows, 'sum' if len(reports) > 1 else '')}"


def _lengths(total: SourceReport) -> str:
    summary = total.length_summary()
    cells = [["tokens of a sample", *(f"{value:,}" for value in summary.values())]]
    return _table(["", *summary], cells)


def _roles(total: SourceReport) -> str:
    rows = [
        [
            _line(role),
            f"{tokens:,}",
            f"{total.trained_by_role[role]:,}",
            _share(total.trained_by_role[role], tokens),
            _meter(total.trained_by_role[role] / tokens if tokens else 0),
        ]
        for role, tokens in sorted(total.tokens_by_role.items())
    ]
    share = _share(total.trained_tokens, total.tokens)
    meter = _meter(total.trained_tokens / total.tokens if total.tokens else 0)
    rows.append(["all", f"{total.tokens:,}", f"{total.trained_tokens:,}", share, meter])
    table = _table(("role", "tokens", "trained", "share", ""), rows, "sum")
    weights = ""
    if total.trained_weight != total.trained_tokens:
        weights = f'<p class="soft">Weights in the loss add up to {total.trained_weight:,.6g}.</p>'
    return f"<h2>Trained tokens by role</h2>\n{table}{weights}"


def _padding(report: DataReport) -> str:
    settings = report.settings
    rows = "".join(
        f'<tr class="{"here" if way == settings.batching else ""}"><td>{way}<small>{WAYS[way]}</small></td>'
        f"<td>{share:.1%}</td><td>{_meter(share)}</td></tr>"
        for way, share in report.padding().items()
    )
    title = f"Padding in batches of {settings.batch_size}"
    head = "<tr><th>batches</th><th>padding</th><th>of what is computed</th></tr>"
    return f'<h2>{title}</h2>\n<div class="card scroll"><table class="ways">{head}{rows}</table></div>'


def _meter(share: float) -> str:
    return f'<div class="meter"><i><i style="width:{share:.1%}"></i></i></div>'


def _steps(report: DataReport) -> str:
    return f"<h2>Optimizer steps</h2>\n<p>{_text(steps_text(report))}</p>"


def _places(sources: Sequence[SourceReport]) -> str:
    """All places that are remembered, to unfold."""
    details = [
        f"<details><summary>{_line(source.name)}: {what}{_line(f', {kind}' if named else '')} "
        f'<span class="soft">{count:,}</span></summary><ol>{_items(tally.places[kind])}</ol></details>'
        for source in sources
        for what, named, tally in _tallies(source)
        for kind, count in tally.counts.items()
    ]
    if not details:
        return ""
    return (
        f'<h2>Where</h2>\n<p class="soft">The first 100 of each kind.</p>\n<div class="card">{"".join(details)}</div>'
    )


def _tallies(source: SourceReport) -> list[tuple[str, bool, ReasonCounts]]:
    return [
        ("skipped", True, source.skipped),
        ("shortened", True, source.truncated),
        ("not filled", True, source.unfilled),
        ("empty answers", False, source.empty_answers),
        ("exact copies", False, source.duplicates),
    ]


def _items(places: Iterable[str]) -> str:
    return "".join(f"<li>{_line(place)}</li>" for place in places)


def _charts(total: SourceReport, most: int) -> str:
    """``most`` is ``--model_max_length``, the limit."""
    summary = total.length_summary()
    marks = {"median": summary["50%"], "95%": summary["95%"], "limit": most}
    charts = [
        _histogram("Length of samples", "tokens of a sample", total.lengths, marks),
        _histogram("Trained tokens of samples", "trained tokens of a sample", total.trained_lengths, {}),
    ]
    return f'<h2>Lengths</h2>\n<div class="charts">{"".join(charts)}</div>'


def _histogram(title: str, unit: str, counts: Mapping[int, int], marks: Mapping[str, float]) -> str:
    """How many samples have how many tokens. What lies far behind all others stands in the last bar, and is told."""
    ordered = sorted(counts.items())
    total, up_to, end = sum(counts.values()), 0, ordered[-1][0]
    for length, count in ordered:
        up_to += count
        if up_to >= 0.99 * total:
            end = min(end, 2 * length)
            break
    step = _nice(max(1, end + 1) / _BINS)
    bins = [0] * (end // step + 1)
    for length, count in ordered:
        bins[min(length // step, len(bins) - 1)] += count
    beyond = sum(count for length, count in ordered if length >= step * len(bins))
    drawing = _drawing(bins, step, unit, marks)
    notes = [f"{beyond:,} longer ones, up to {ordered[-1][0]:,}, stand in the last bar."] if beyond else []
    if "limit" in marks:
        notes.append(f"The limit is --model_max_length {marks['limit']:,}.")
    note = f"<p>{' '.join(notes)}</p>" if notes else ""
    return f'<figure class="card"><figcaption>{title}</figcaption>{drawing}{note}</figure>'


def _drawing(bins: Sequence[int], step: int, unit: str, marks: Mapping[str, float]) -> str:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    end, highest = step * len(bins), max(bins)

    def x(value: float) -> float:
        return round(_LEFT + (right - _LEFT) * value / end, 1)

    def y(value: float) -> float:
        return round(bottom - (bottom - _TOP) * value / highest, 1)

    parts = ['<text x="0" y="10">samples</text>']
    for value in range(0, highest + 1, _nice(highest / 4)):
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y(value)}" y2="{y(value)}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y(value) + 4}" text-anchor="end">{_short(value)}</text>')
    for index, count in enumerate(bins):
        if count:
            left, width = x(index * step), max(0.8, x((index + 1) * step) - x(index * step) - 1)
            name = f"{index * step:,} to {(index + 1) * step - 1:,} tokens: {count:,} samples"
            parts.append(
                f'<rect class="bar" x="{left}" y="{y(count)}" width="{width:.1f}" height="{bottom - y(count):.1f}">'
                f"<title>{name}</title></rect>"
            )
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    for value in range(0, end + 1, _nice(end / 5)):
        parts.append(f'<text x="{x(value)}" y="{bottom + 16}" text-anchor="middle">{_short(value)}</text>')
    parts.append(f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">{unit}</text>')
    before: float = -_WIDTH
    row = 0
    for name, place in sorted(marks.items(), key=lambda mark: mark[1]):
        if place <= end:
            # Names that would touch stand one above the other.
            row = 1 - row if x(place) - before < 48 else 0
            before, top = x(place), _TOP - 8 - 12 * row
            parts.append(f'<line class="mark" x1="{before}" x2="{before}" y1="{top + 3}" y2="{bottom}"/>')
            parts.append(f'<text class="mark-name" x="{before}" y="{top}" text-anchor="middle">{name}</text>')
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="Histogram: {unit}">{"".join(parts)}</svg>'


def _nice(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50... that is no less."""
    power = 1
    while True:
        for digit in (1, 2, 5):
            if digit * power >= least:
                return digit * power
        power *= 10


def _short(number: int) -> str:
    """``950``, ``1.2k``, ``3.4M``."""
    for size, letter in ((1_000_000_000, "G"), (1_000_000, "M"), (1000, "k")):
        if number >= size:
            return f"{number / size:.1f}".removesuffix(".0") + letter
    return str(number)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "–"
