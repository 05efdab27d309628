"""A report as one web page that needs nothing else: no script, no font, no request. It may be sent to a colleague."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from data_utils.report.data_report import DataReport
from data_utils.report.histogram import Histogram, draw_histogram, short_number
from data_utils.report.samples import Sample, SamplePiece, shorten, visible, visible_line
from data_utils.report.source_report import SourceReport
from data_utils.report.terminal import BATCHING, steps_text

_SHOWN_TOKENS = 2000
_LINE_END = Markup('<span class="n">↵</span>\n')


def render_html(reports: Sequence[DataReport]) -> str:
    """One page of one or more sets. Text of the user's data is only ever text in it, and all of it is valid UTF-8."""
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
    environment.globals |= {"title": _title, "share": _share, "steps_text": steps_text, "batching": BATCHING}
    environment.filters |= {
        "line": lambda text: visible_line(text, 300),
        "number": lambda number: f"{number:,}",
        "percent": lambda share: f"{share:.1%}",
        "short": short_number,
        "turns": _turns,
        "has_control_tokens": lambda samples: any(piece.kind == "control" for piece in _pieces(samples)),
        "has_weights": lambda samples: any(piece.weight not in (0, 1) for piece in _pieces(samples)),
        "charts": _charts,
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
    """The roles of a sample in order, each with its text, trained tokens and control tokens marked."""
    pieces = shorten(sample.pieces, _SHOWN_TOKENS)
    return [(role, _marked(list(group))) for role, group in groupby(pieces, key=lambda piece: piece.role)]


def _marked(pieces: Sequence[SamplePiece]) -> Markup:
    parts = []
    for weight, group in groupby(pieces, key=lambda piece: piece.weight):
        run = Markup().join(map(_piece, group))
        if weight > 0:
            note = "" if weight == 1 else Markup('<span class="w">×{:g}</span>').format(weight)
            run = Markup('<span class="t">{}{}</span>').format(note, run)
        parts.append(run)
    return Markup().join(parts)


def _piece(piece: SamplePiece) -> Markup:
    if piece.kind == "gap":
        return Markup('<span class="g">… {:,} tokens left out …</span>').format(piece.tokens)
    text = _LINE_END.join(visible(piece.text).split("\n"))
    return Markup('<span class="c">{}</span>').format(text) if piece.kind == "control" else text


def _charts(report: DataReport) -> list[Histogram]:
    total = report.total()
    summary, limit = total.length_summary(), report.settings.model_max_length
    marks: Mapping[str, float] = {"median": summary["50%"], "95%": summary["95%"], "limit": limit}
    note = f"The limit is --model_max_length {limit:,}."
    return [
        draw_histogram("Length of samples", "tokens of a sample", total.lengths, marks, note),
        draw_histogram("Trained tokens of samples", "trained tokens of a sample", total.trained_lengths),
    ]


def _located(source: SourceReport) -> list[tuple[Any, ...]]:
    """What was found in a source: its name, how often, and the first places."""
    named = (("skipped", source.skipped), ("shortened", source.truncated), ("not filled", source.unfilled))
    found = [(f"{name}, {kind}", tally, kind) for name, tally in named for kind in tally.counts]
    unnamed = (("empty answers", source.empty_answers), ("exact copies", source.duplicates))
    found += [(name, tally, kind) for name, tally in unnamed for kind in tally.counts]
    return [(name, tally.counts[kind], tally.places[kind]) for name, tally, kind in found]
