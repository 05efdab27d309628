"""The location of a record in the user's data."""

from __future__ import annotations

from typing import NamedTuple


class Location(NamedTuple):
    """Location of a record: ``a.jsonl:12``, ``a.json:12 (record 3)`` or ``a.parquet (record 7)``; counted from 1."""

    path: str
    line: int | None = None
    record: int | None = None

    def __str__(self) -> str:
        line = "" if self.line is None else f":{self.line}"
        record = "" if self.record is None else f" (record {self.record})"
        return f"{self.path}{line}{record}"
