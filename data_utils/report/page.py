"""Data reports as one self-contained web page: no script, no font, no request, so it can be sent to a colleague."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from console import visible
from data_utils.report.data_report import DataReport
from data_utils.report.histogram import Histogram, build_histogram, short_number
from data_utils.report.padding import STRATEGIES
from data_utils.report.samples import Sample, SamplePiece, shorten, visible_line
from data_utils.report.source_report import SourceReport

_SHOWN_TOKENS = 2000
_LINE_END = Markup('<span class="n">↵</span>\n')


def render_html(reports: Sequence[DataReport]) -> str:
    """Render one page of one or more sets.

    Every string is made visible and escaped, so the user's data cannot add markup, and the page is valid UTF-8.
    """
    names = " and ".join(_title(report).lower() for report in reports)
    return _environment().get_template("page.html").render(page_title=f"Data report: {names}", reports=reports)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals |= {"title": _title, "share": _share, "strategies": STRATEGIES}
    environment.filters |= {
        "line": lambda text: visible_line(text, 300),
        "number": lambda number: f"{number:,}",
        "percent": lambda share: f"{share:.1%}",
        "short": short_number,
        "turns": _turns,
        "has_control_tokens": lambda samples: any(piece.kind == "control" for piece in _pieces(samples)),
        "has_weights": lambda samples: any(piece.weight not in (0, 1) for piece in _pieces(samples)),
        "histograms": _histograms,
        "located": _located,
    }
    return environment


def _title(report: DataReport) -> str:
    return {"train": "Training data", "eval": "Evaluation data"}.get(report.name, report.name)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "–"


def _pieces(samples: Sequence[Sample]) -> Iterator[SamplePiece]:
    return (piece for sample in samples for piece in sample.pieces)


def _turns(sample: Sample) -> list[tuple[str, Markup]]:
    """Return the turns of a sample: role, and text with trained tokens and control tokens marked."""
    pieces = shorten(sample.pieces, _SHOWN_TOKENS)
    return [(role, _marked(list(group))) for role, group in groupby(pieces, key=lambda piece: piece.role)]


def _marked(pieces: Sequence[SamplePiece]) -> Markup:
    parts = []
    for weight, group in groupby(pieces, key=lambda piece: piece.weight):
        run = Markup().join(map(_piece, group))
        if weight > 0:
            loss_weight = "" if weight == 1 else Markup('<span class="w">×{:g}</span>').format(weight)
            run = Markup('<span class="t">{}{}</span>').format(loss_weight, run)
        parts.append(run)
    return Markup().join(parts)


def _piece(piece: SamplePiece) -> Markup:
    if piece.kind == "gap":
        return Markup('<span class="g">… {:,} tokens left out …</span>').format(piece.tokens)
    text = _LINE_END.join(visible(piece.text).split("\n"))
    return Markup('<span class="c">{}</span>').format(text) if piece.kind == "control" else text


def _histograms(report: DataReport) -> list[Histogram]:
    total = report.total()
    summary, limit = total.length_summary(), report.settings.model_max_length
    marks = {"median": summary["50%"], "95%": summary["95%"], "limit": limit}
    note = f"The limit is --model_max_length {limit:,}."
    return [
        build_histogram("Length of samples", "tokens per sample", total.lengths, marks, note),
        build_histogram("Trained tokens of samples", "trained tokens per sample", total.trained_lengths),
    ]


def _located(source: SourceReport) -> list[tuple[str, int, list[str]]]:
    """Return the findings in a source that have locations: name, count, first locations."""
    by_reason = (
        *(("skipped", source.skipped), ("shortened", source.truncated)),
        *(("not filled", source.unfilled), ("note", source.notes)),
    )
    findings = [(f"{name}, {reason}", counts, reason) for name, counts in by_reason for reason in counts.counts]
    without_reason = (("empty answers", source.empty_answers), ("exact copies", source.duplicates))
    findings += [(name, counts, reason) for name, counts in without_reason for reason in counts.counts]
    return [(name, counts.counts[reason], counts.locations[reason]) for name, counts, reason in findings]
