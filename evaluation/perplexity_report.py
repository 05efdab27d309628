"""The report of perplexities: a row for each model and variant, a column for each length; as JSON, text and a page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from evaluation.comparison import RESAMPLES, Values, difference_of, mean_of
from evaluation.kept import Key, Row
from evaluation.page import environment
from evaluation.perplexity import Windows

FEWEST = 5
"""Windows below which no interval is shown: there is too little to draw from."""


def build_rows(
    rows: Mapping[Key, Row], labels: Sequence[str], variants: Sequence[str], windows: Windows, seed: int
) -> list[dict[str, Any]]:
    """Return the rows of the table; differences are from the first one, window by window.

    Args:
        rows: with those of all windows for each label and variant.
    """
    table: list[dict[str, Any]] = []
    for label in labels:
        for variant in variants:
            cells = []
            for length in windows.lengths:
                values = _values(rows, label, variant, length, windows)
                cells.append(_cell(values, length, seed))
                if table and len(values) >= FEWEST:
                    first = _values(rows, labels[0], variants[0], length, windows)
                    cells[-1]["difference"] = asdict(difference_of("loss", values, first, seed))
            table.append({"model": label, "variant": variant, "cells": cells})
    return table


def _values(rows: Mapping[Key, Row], label: str, variant: str, length: int, windows: Windows) -> Values:
    of_cell = [rows[label, variant, length, number] for number in range(windows.count(length))]
    return [(row["loss"] / row["targets"], float(row["targets"])) for row in of_cell]


def _cell(values: Values, length: int, seed: int) -> dict[str, Any]:
    mean = mean_of(values, seed)
    cell = {"length": length, "windows": len(values), "loss": mean.value, "perplexity": _perplexity(mean.value)}
    if len(values) >= FEWEST:
        cell |= {"low": _perplexity(mean.low), "high": _perplexity(mean.high)}
    return cell


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700))


def build_report(
    rows: Mapping[Key, Row], labels: Sequence[str], variants: Sequence[str], windows: Windows, seed: int
) -> dict[str, Any]:
    """Return the table with what its windows are."""
    sizes = {"tokens": windows.tokens, "used": windows.used, "lengths": windows.lengths}
    return {**sizes, "rows": build_rows(rows, labels, variants, windows, seed), "seed": seed, "resamples": RESAMPLES}


def render_table(report: Mapping[str, Any]) -> str:
    """Return the table as text."""
    names = [_name(report, row) for row in report["rows"]]
    width = max(8, *map(len, names)) + 2
    lines = [f"perplexity of {report['text']}: {report['used']:,} of {report['tokens']:,} tokens"]
    lines.append("  " + f"{'tokens':<{width}}" + "".join(f"{length:<16}" for length in report["lengths"]).rstrip())
    counts = [f"{cell['windows']:<16}" for cell in report["rows"][0]["cells"]]
    lines.append("  " + f"{'windows':<{width}}" + "".join(counts).rstrip())
    for name, row in zip(names, report["rows"], strict=True):
        cells = [f"{cell['perplexity']:.4g}{_verdict(cell)}" for cell in row["cells"]]
        lines.append("  " + f"{name:<{width}}" + "".join(f"{cell:<16}" for cell in cells).rstrip())
    return "\n".join(lines)


def _name(report: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    return str(row["variant"]) if len(report["models"]) == 1 else f"{row['model'][:32]} {row['variant']}"


def _verdict(cell: Mapping[str, Any]) -> str:
    verdict = cell.get("difference", {}).get("verdict", "not shown")
    return "" if verdict == "not shown" else f" {verdict}"


def render_page(report: Mapping[str, Any]) -> str:
    """Render the table as a page; every text is made visible and escaped."""
    return environment().get_template("page_of_perplexity.html").render(report=report, fewest=FEWEST)
