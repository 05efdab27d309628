"""The report of an evaluation as one self-contained web page, in the style of the data reports."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from console import visible
from data_utils.report import page
from evaluation.kept import Key, Row
from evaluation.metrics import OTHER_SCORES, SCORES
from evaluation.report import FIGURES

_SHOWN_ANSWERS, _SHOWN_CHARACTERS = 200, 2000
_TITLES = {"held_out": "Held-out questions", "general": "General questions: what was forgotten"}
_MEANINGS = {**OTHER_SCORES, **SCORES, "loss": "nats per token of the expected answers", "perplexity": "exp(loss)"}
# Of a plot, in its own units.
_NAMES, _WIDTH, _ROW = 130, 460, 26


def render_page(report: Mapping[str, Any], rows: Mapping[Key, Row], places: Mapping[str, Sequence[str]]) -> str:
    """Render the page. Every text is made visible and escaped, so that no answer can add markup.

    Args:
        rows, places: see ``build_report``.
    """
    labels = [model["label"] for model in report["models"]]
    answers = {
        name: [_answers([rows[label, name, place] for label in labels]) for place in of_set[:_SHOWN_ANSWERS]]
        for name, of_set in places.items()
    }
    return environment().get_template("page_of_evaluation.html").render(report=report, answers=answers)


def _answers(rows: Sequence[Row]) -> dict[str, Any]:
    first = rows[0]
    texts = {name: _shortened(first[name]) for name in ("question", "expected", "where")}
    return {**texts, "answers": [(_shortened(row["answer"]), _is_right(row)) for row in rows]}


def _is_right(row: Row) -> bool:
    scores = row["scores"]
    return any(scores.get(name) == 1 for name in ("exact_match", "accuracy", "pass@1"))


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


@cache
def environment() -> Environment:
    """Return what renders the pages of this package."""
    environment = Environment(
        loader=FileSystemLoader([Path(__file__).parent, Path(page.__file__).parent]),
        autoescape=True,
        finalize=lambda value: _visible_text(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = lambda value: f"{value:.4g}"
    environment.filters["json"] = json.dumps
    meanings = {figure: _MEANINGS.get(figure, "") for figure in (*FIGURES, "perplexity")}
    environment.globals |= {
        "plot": _plot, "titles": _TITLES, "figures": (*FIGURES, "perplexity"), "meanings": meanings,
    }  # fmt: skip
    return environment


def _visible_text(text: str) -> str:
    return "\n".join(map(visible, text.split("\n")))


def _plot(title: str, differences: Mapping[str, Mapping[str, Any]]) -> Markup:
    """Return a figure of intervals around their differences; the loss has its own unit, so its sign alone is shown."""
    shown = {name: each for name, each in differences.items() if name != "loss"}
    largest = max([abs(each[end]) for each in shown.values() for end in ("low", "high")] or [0]) or 1.0
    middle = _NAMES + (_WIDTH - _NAMES) / 2

    def place(value: float) -> float:
        return round(middle + value / largest * (_WIDTH - _NAMES) / 2 * 0.95, 1)

    height = _ROW * len(shown) + 24
    parts = [Markup('<line class="mark" x1="{0}" x2="{0}" y1="0" y2="{1}"/>').format(middle, height - 24)]
    for number, (name, each) in enumerate(shown.items()):
        y = _ROW * number + _ROW / 2
        kind = {"not shown": "unclear"}.get(each["verdict"], each["verdict"])
        parts.append(
            Markup(
                '<text x="0" y="{1}">{0}</text><line class="{2}" stroke-width="2" x1="{3}" x2="{4}" y1="{5}" y2="{5}"/>'
                '<circle class="{2}" cx="{6}" cy="{5}" r="4"/>'
            ).format(name, y + 4, kind, place(each["low"]), place(each["high"]), y, place(each["value"]))
        )
    for value in (-largest, 0.0, largest):
        text = Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>')
        parts.append(text.format(place(value), height - 6, f"{value:+.3g}" if value else "0"))
    figure = Markup(
        '<figure class="card"><figcaption>{}</figcaption><svg viewBox="0 0 {} {}" role="img">{}</svg></figure>'
    )
    return figure.format(_visible_text(title), _WIDTH + 20, height, Markup().join(parts))
