"""Bounded counts for the data report: events by reason with their first locations, and the samples seen so far."""

from __future__ import annotations

import errno
import re
import sqlite3
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from data_utils.report.samples import visible_line

_RECORDED_LOCATIONS = 100
_LOGGED_LOCATIONS = 5
# Reasons may quote the data, so without a limit there could be as many as there are records.
_MAX_REASONS = 50
OTHER_REASONS = "others"
# Separates the location of a copy from that of its original.
COPY_OF = " = "
# What follows the file name in a location.
_AFTER_PATH = re.compile(r"(:\d+)?( \(record \d+\))?( = .*)?$")


@dataclass
class ReasonCounts:
    """Number of occurrences per reason, with the first 100 different locations of each.

    The first 50 reasons are counted separately, later ones together. Reasons and locations are single lines without
    control characters.

    Attributes:
        most: number of reasons that are counted separately.
    """

    counts: Counter[str] = field(default_factory=Counter)
    locations: dict[str, list[str]] = field(default_factory=dict)
    most: float = field(default=_MAX_REASONS, repr=False, compare=False)

    @property
    def total(self) -> int:
        return self.counts.total()

    def add(self, reason: str, where: object, copies: int = 1) -> None:
        self._add(visible_line(reason), copies, [visible_line(where)])

    def __add__(self, other: ReasonCounts) -> ReasonCounts:
        both = ReasonCounts()
        for counts in (self, other):
            for reason, count in counts.counts.items():
                both._add(reason, count, counts.locations[reason])
        return both

    def _add(self, reason: str, count: int, locations: Iterable[str]) -> None:
        if reason not in self.counts and len(self.counts) >= self.most:
            reason = OTHER_REASONS
        self.counts[reason] += count
        recorded = self.locations.setdefault(reason, [])
        if room := _RECORDED_LOCATIONS - len(recorded):
            recorded += [where for where in locations if where not in recorded][:room]

    def first_locations(self, reason: str) -> str:
        """Return the first few locations of a reason, with a shared file name only once: ``a.jsonl:3, :7, :12``."""
        first, *others = self.locations[reason][:_LOGGED_LOCATIONS]
        path = _AFTER_PATH.sub("", first)
        rest = "".join(f", {location}" for location in others)
        for separator in (", ", COPY_OF):
            first, rest = (text.replace(f"{separator}{path}:", f"{separator}:") for text in (first, rest))
        return first + rest + (", ..." if len(self.locations[reason]) > _LOGGED_LOCATIONS else "")


def counted(count: int, nouns: str) -> str:
    """Return a number with its noun, of which ``nouns`` is the plural: ``1 sample``, ``2 samples``."""
    return f"{count:,} {nouns.removesuffix('s') if count == 1 else nouns}"


class DuplicateIndex:
    """The digests of the samples seen so far, in a temporary SQLite file, so that memory stays bounded."""

    def __init__(self) -> None:
        self._database: sqlite3.Connection | None = None
        self._count = 0

    def add(self, digests: Sequence[bytes], locations: Sequence[str]) -> list[str | None]:
        """Record the locations of new digests; return for each digest ``None``, or the first location of a known one.

        Raises:
            OSError: the disk of the temporary file is full.
        """
        numbers = range(self._count, self._count + len(digests))
        self._count = numbers.stop
        try:
            database = self._database or self._open()
            rows = zip(digests, numbers, locations, strict=True)
            if database.executemany("INSERT OR IGNORE INTO samples VALUES (?, ?, ?)", rows).rowcount == len(digests):
                return [None] * len(digests)
            find = "SELECT number, location FROM samples WHERE digest = ?"
            found = [database.execute(find, (digest,)).fetchone() for digest in digests]
        except sqlite3.OperationalError as error:
            raise OSError(errno.ENOSPC, str(error), tempfile.gettempdir()) from None
        return [None if first == number else str(where) for number, (first, where) in zip(numbers, found, strict=True)]

    def close(self) -> None:
        """Delete the temporary file."""
        if self._database is not None:
            self._database.close()
            self._database = None

    def _open(self) -> sqlite3.Connection:
        # An empty name means a temporary file, which is written only when the cache (here 16 MiB) is full.
        database = sqlite3.connect("", check_same_thread=False)
        weakref.finalize(self, database.close)
        for setting in ("journal_mode = OFF", "synchronous = OFF", "cache_size = -16384"):
            database.execute(f"PRAGMA {setting}").close()
        database.execute("CREATE TABLE samples (digest BLOB PRIMARY KEY, number INTEGER, location TEXT) WITHOUT ROWID")
        self._database = database
        return database

    def __reduce__(self) -> tuple[type[DuplicateIndex], tuple[()]]:
        # Pickled for another process, which adds no samples.
        return DuplicateIndex, ()
