"""Blocks of records before and after tokenising, as columns: what one process sends to another quickly.

A process gets a few large columns tens of times as fast as some objects for each record.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, NamedTuple

from data_utils.encode import EncodedConversation, Span
from data_utils.json_stream import JsonLine
from data_utils.location import Location
from data_utils.report.source_report import SourceReport
from errors import DataError

Record = tuple[Location, object]
"""The location of a record and its value; the value is a ``JsonLine`` if it is not parsed yet."""


class Records(list[Record]):
    """Records of one file, at least one."""

    def __reduce__(self) -> tuple[Callable[..., Records], tuple[Any, ...]]:
        places, values = zip(*self, strict=True)
        paths, lines, numbers = zip(*places, strict=True)
        if all(isinstance(value, JsonLine) for value in values):
            texts, _, indents, offsets = zip(*values, strict=True)
            return _lines, (paths[0], lines, texts, indents, offsets)
        return _records, (paths[0], lines, numbers, values)


def _lines(path: str, lines: Any, texts: Any, indents: Any, offsets: Any) -> Records:
    places = [Location(path, line) for line in lines]
    return Records(zip(places, map(JsonLine, texts, places, indents, offsets), strict=True))


def _records(path: str, lines: Any, numbers: Any, values: Any) -> Records:
    return Records(zip(map(Location, repeat(path), lines, numbers), values, strict=True))


class KeptConversation(NamedTuple):
    """A conversation that is used, or a piece of a plain text.

    Attributes:
        set_name: ``train`` or ``eval``.
        source: index of its source in the set.
        copies: number of times it is used.
        where: the location of its record.
        encoded: without the ``full_length``.
    """

    set_name: str
    source: int
    copies: int
    where: Location
    encoded: EncodedConversation


def _ints() -> array[int]:
    return array("i")


@dataclass
class EncodedBlock:
    """What has become of a block of records: samples that are used, one after the other, and counts.

    Attributes:
        path: the file of the records.
        ids: of all samples; ``lengths`` divides them.
        run_lengths, run_weights, run_roles: the spans of all samples; ``run_counts`` divides them.
        copies: how often each sample is used; ``set_names``: in which set.
        lines, records: the place of each sample's record; 0 is unknown.
        digests: of each sample, see ``digest_of``; ``locations``: its place as one visible line.
        is_text: some samples are plain text.
        reports: the counts of each set, which do not tell copies from distinct samples.
        faults: of the records that cannot be used.
        placeholders: the names of all that the records contain.
        sources: index of the records' source in each set, added by the reader.
        spans: of the samples that were added last, until ``finish``.
    """

    path: str
    ids: array[int] = field(default_factory=_ints)
    run_lengths: array[int] = field(default_factory=_ints)
    run_weights: array[float] = field(default_factory=lambda: array("d"))
    run_roles: list[str] = field(default_factory=list)
    lengths: array[int] = field(default_factory=_ints)
    run_counts: array[int] = field(default_factory=_ints)
    turns_dropped: array[int] = field(default_factory=_ints)
    copies: array[int] = field(default_factory=_ints)
    set_names: list[str] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    records: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    locations: list[str] = field(default_factory=list)
    is_text: bool = False
    reports: dict[str, SourceReport] = field(default_factory=dict)
    faults: list[DataError] = field(default_factory=list)
    placeholders: set[str] = field(default_factory=set)
    sources: dict[str, int] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)

    def report_of(self, set_name: str) -> SourceReport:
        """Return the counts of a set."""
        report = self.reports.get(set_name)
        if report is None:
            report = self.reports[set_name] = SourceReport.part()
        return report

    def add(
        self,
        ids: array[int],
        encoded: EncodedConversation,
        set_name: str,
        copies: int,
        where: Location,
        digest: bytes,
        location: str,
    ) -> None:
        """Append a sample, and its ids as an array."""
        self.ids.extend(ids)
        self.spans += encoded.spans
        self.lengths.append(len(ids))
        self.run_counts.append(len(encoded.spans))
        self.turns_dropped.append(encoded.turns_dropped)
        self.copies.append(copies)
        self.set_names.append(set_name)
        self.lines.append(where.line or 0)
        self.records.append(where.record or 0)
        self.digests.append(digest)
        self.locations.append(location)

    def finish(self) -> EncodedBlock:
        """Make columns of the spans when all samples have been added; return the block."""
        if self.spans:
            lengths, roles, weights = zip(*self.spans, strict=True)
            self.run_lengths.extend(lengths)
            self.run_roles.extend(roles)
            self.run_weights.extend(weights)
            self.spans = []
        return self

    def conversations(self) -> Iterator[KeptConversation]:
        """Yield the samples, in order."""
        start = run = 0
        for number, set_name in enumerate(self.set_names):
            end, last_run = start + self.lengths[number], run + self.run_counts[number]
            runs = (self.run_lengths[run:last_run], self.run_roles[run:last_run], self.run_weights[run:last_run])
            encoded = EncodedConversation(self.ids[start:end], list(map(Span, *runs)), self.turns_dropped[number])
            where = Location(self.path, self.lines[number] or None, self.records[number] or None)
            yield KeptConversation(set_name, self.sources[set_name], self.copies[number], where, encoded)
            start, run = end, last_run
