"""The report of an evaluation: means with intervals, differences from the base, and losses by turn, as JSON values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from evaluation.comparison import RESAMPLES, Values, difference_of, mean_of
from evaluation.kept import Key, Row
from evaluation.metrics import ANSWER_TOKENS, OTHER_SCORES, SCORES

FIGURES = (*OTHER_SCORES, *SCORES, "token_accuracy", "loss", ANSWER_TOKENS)
_TURNS = 8  # of a conversation, whose losses are reported apart


def build_report(
    rows: Mapping[Key, Row], labels: Sequence[str], places: Mapping[str, Sequence[str]], seed: int
) -> dict[str, Any]:
    """Return the figures of each set.

    Args:
        rows: with those of all ``places`` for each label.
        labels: of the models; differences are from the first one.
        places: of the questions that all models have answered, by set.
    """
    sets = {}
    for name, of_set in places.items():
        by_label = {label: [rows[label, name, place] for place in of_set] for label in labels}
        first = by_label[labels[0]]
        sets[name] = {
            "questions": len(of_set),
            "figures": {label: _figures(each, seed) for label, each in by_label.items()},
            "differences": {label: _differences(by_label[label], first, seed) for label in labels[1:]},
            "turns": {label: _turns(each) for label, each in by_label.items()},
            "subjects": {label: each for label in labels if (each := _subjects(by_label[label]))},
        }
    return {"seed": seed, "resamples": RESAMPLES, "sets": sets}


def _values(rows: Sequence[Row], name: str) -> Values:
    """Return the value and the weight of a figure for each row that has it."""
    if name not in ("loss", "token_accuracy"):
        return [(row["scores"][name], row.get("weight", 1.0)) for row in rows if name in row["scores"]]
    values = []
    for row in rows:
        if row["losses"]:
            targets, loss, correct = (sum(column) for column in zip(*row["losses"], strict=True))
            values.append(((loss if name == "loss" else correct) / targets, float(targets)))
    return values


def _figures(rows: Sequence[Row], seed: int) -> dict[str, Any]:
    figures = {name: asdict(mean_of(values, seed)) for name in FIGURES if (values := _values(rows, name))}
    if loss := figures.get("loss"):
        figures["perplexity"] = {**loss, **{name: math.exp(min(loss[name], 700)) for name in ("value", "low", "high")}}
    return figures


def _differences(rows: Sequence[Row], others: Sequence[Row], seed: int) -> dict[str, Any]:
    differences = {}
    for name in FIGURES:
        values, other_values = _values(rows, name), _values(others, name)
        if name != ANSWER_TOKENS and values and len(values) == len(other_values):
            differences[name] = asdict(difference_of(name, values, other_values, seed))
    return differences


def _subjects(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Return the mean of each subject of a benchmark, and the number of its questions; nothing for other sets."""
    scores: dict[str, list[float]] = {}
    for row in rows:
        if "subject" in row:
            scores.setdefault(row["subject"], []).extend(row["scores"].values())
    return {name: {"value": sum(each) / len(each), "questions": len(each)} for name, each in scores.items()}


def _turns(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the losses of first answers, second ones and so on."""
    turns = []
    for number in range(min(_TURNS, max((len(row["losses"]) for row in rows), default=0))):
        parts = [row["losses"][number] for row in rows if number < len(row["losses"])]
        targets, loss, correct = (sum(column) for column in zip(*parts, strict=True))
        turns.append({
            "turn": number + 1, "answers": len(parts), "loss": loss / targets,
            "perplexity": math.exp(min(loss / targets, 700)), "token_accuracy": correct / targets,
        })  # fmt: skip
    return turns


def render_tables(report: Mapping[str, Any]) -> list[str]:
    """Return the main figures of each set as text: a row for each figure, a column for each model."""
    tables = []
    for name, of_set in report["sets"].items():
        labels = list(of_set["figures"])
        lines = [f"{name}: {of_set['questions']} questions"]
        lines.append("  " + f"{'':<16}" + "".join(f"{label[:32]:<34}" for label in labels))
        for figure in (*FIGURES, "perplexity"):
            cells = [_cell(of_set, label, figure) for label in labels]
            if any(cells):
                lines.append("  " + f"{figure:<16}" + "".join(f"{cell:<34}" for cell in cells).rstrip())
        tables.append("\n".join(lines))
    return tables


def _cell(of_set: Mapping[str, Any], label: str, figure: str) -> str:
    if (mean := of_set["figures"][label].get(figure)) is None:
        return ""
    difference = of_set["differences"].get(label, {}).get(figure)
    sign = {"better": " better", "worse": " worse"}.get(difference["verdict"], "") if difference else ""
    return f"{mean['value']:.4g} ({mean['low']:.3g} to {mean['high']:.3g}){sign}"
