"""A data report as JSON values from which it can be built again, unlike ``as_dict``, which is for readers."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields
from typing import Any

from data_utils.report.counts import ReasonCounts
from data_utils.report.data_report import DataReport, ReportSettings
from data_utils.report.samples import Sample, SamplePiece
from data_utils.report.source_report import SourceReport

_NOT_SAVED = "duplicate_index"  # what has been counted cannot be continued


def report_values(report: DataReport) -> dict[str, Any]:
    """Return all counts and samples of a report, without its settings."""
    names = [item.name for item in fields(SourceReport) if item.name != _NOT_SAVED]
    return {
        "sources": [{name: _saved(getattr(source, name)) for name in names} for source in report.sources],
        "samples": [
            [sample.where, sample.source, [list(piece) for piece in sample.pieces]] for sample in report.samples
        ],
    }


def report_from_values(name: str, values: dict[str, Any], settings: ReportSettings, max_samples: int) -> DataReport:
    """Return the report of the set ``name`` from ``report_values``, with the settings of this run."""
    report = DataReport(name, settings, max_samples)
    for saved in values["sources"]:
        source = report.add_source("")
        for field, value in saved.items():
            setattr(source, field, _restored(getattr(source, field), value))
    report.samples = [
        Sample(where, source, tuple(SamplePiece(*piece) for piece in pieces))
        for where, source, pieces in values["samples"]
    ]
    return report


def _saved(value: Any) -> Any:
    if isinstance(value, ReasonCounts):
        return [list(value.counts.items()), value.locations]
    return list(value.items()) if isinstance(value, Counter) else value


def _restored(empty: Any, value: Any) -> Any:
    """Return a saved value as the type of the same attribute in an empty report."""
    if isinstance(empty, ReasonCounts):
        return ReasonCounts(Counter(dict(value[0])), value[1])
    return Counter(dict(value)) if isinstance(empty, Counter) else value
