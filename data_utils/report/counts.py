"""Counts that do not grow with the data: kinds of things with their first places, and which samples came before."""

from __future__ import annotations

import errno
import re
import sqlite3
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from data_utils.report.samples import visible_line

_RECORDED_PLACES = 100
_LOGGED_PLACES = 5
# Reasons may quote the data, and are then as many as its faults.
_KINDS = 50
OTHERS = "others"
# Between the place of a copy and that of its original; and what is behind a file's name in a place.
SAME_AS = " = "
_PLACE = re.compile(r"(:\d+)?( \(record \d+\))?( = .*)?$")


@dataclass
class ReasonCounts:
    """How often something happened, by its kind, and the first 100 places of each kind.

    The first 50 kinds are told apart. Keys and places are single lines, safe to show.
    """

    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return self.counts.total()

    def add(self, kind: str, where: object, times: int = 1) -> None:
        self._add(visible_line(kind), times, [visible_line(where)])

    def __add__(self, other: ReasonCounts) -> ReasonCounts:
        both = ReasonCounts()
        for tally in (self, other):
            for kind, count in tally.counts.items():
                both._add(kind, count, tally.places[kind])
        return both

    def _add(self, kind: str, times: int, places: Iterable[str]) -> None:
        if kind not in self.counts and len(self.counts) >= _KINDS:
            kind = OTHERS
        self.counts[kind] += times
        held = self.places.setdefault(kind, [])
        held += list(places)[: _RECORDED_PLACES - len(held)]

    def first(self, kind: str) -> str:
        """The first few places of a kind, their file named once: ``a.jsonl:3, :7, :12``."""
        first, *more = self.places[kind][:_LOGGED_PLACES]
        path = _PLACE.sub("", first)
        rest = "".join(f", {place}" for place in more)
        for before in (", ", SAME_AS):
            first, rest = (each.replace(f"{before}{path}:", f"{before}:") for each in (first, rest))
        return first + rest + (", ..." if len(self.places[kind]) > _LOGGED_PLACES else "")


class DuplicateIndex:
    """Which samples there were, in a temporary file that goes away with it."""

    def __init__(self) -> None:
        self._database: sqlite3.Connection | None = None

    def first_place(self, digest: bytes, where: str) -> str | None:
        """Where the same digest came before; ``None`` for a new one, which is remembered."""
        try:
            database = self._database or self._open()
            if database.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (digest, where)).rowcount:
                return None
            (place,) = database.execute("SELECT place FROM seen WHERE digest = ?", (digest,)).fetchone()
        except sqlite3.OperationalError as error:
            raise OSError(errno.ENOSPC, str(error), tempfile.gettempdir()) from None
        return str(place)

    def close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

    def _open(self) -> sqlite3.Connection:
        # The empty name is a temporary file, which is only written once the cache (here 16 MiB) is full.
        database = sqlite3.connect("", check_same_thread=False)
        weakref.finalize(self, database.close)
        for setting in ("journal_mode = OFF", "synchronous = OFF", "cache_size = -16384"):
            database.execute(f"PRAGMA {setting}").close()
        database.execute("CREATE TABLE seen (digest BLOB PRIMARY KEY, place TEXT) WITHOUT ROWID")
        self._database = database
        return database

    def __reduce__(self) -> tuple[type[DuplicateIndex], tuple[()]]:
        # A copy in another process has nothing more to count.
        return DuplicateIndex, ()
