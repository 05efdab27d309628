"""Counts by reason with locations, and the search for duplicates."""

from __future__ import annotations

import random

import pytest

from data_utils.report.counts import ReasonCounts
from data_utils.report.data_report import DataReport
from data_utils.report.source_report import SourceReport
from tests.reports import exchange, spans


def test_reason_counts_keep_100_locations_of_50_reasons() -> None:
    counts = ReasonCounts()
    for number in range(1000):
        counts.add(f"reason {number % 60}", f"a:{number}", copies=2)
    assert counts.total == 2000
    assert len(counts.counts) == 51
    # Ten reasons came after the limit, 16 or 17 times each.
    assert counts.counts["others"] == 2 * sum(number % 60 >= 50 for number in range(1000))
    assert len(counts.locations["others"]) == 100
    assert counts.locations["reason 0"][:3] == ["a:0", "a:60", "a:120"]


def test_first_locations_name_a_shared_file_once() -> None:
    counts = ReasonCounts()
    for line in range(1, 8):
        counts.add("x", f"data/a.json:{line} (record {line})")
    first = "data/a.json:1 (record 1), :2 (record 2), :3 (record 3), :4 (record 4), :5 (record 5), ..."
    assert counts.first_locations("x") == first
    other = ReasonCounts()
    other.add("x", "a.jsonl:3 = a.jsonl:1")
    other.add("x", "b.jsonl:4 = a.jsonl:2")
    assert other.first_locations("x") == "a.jsonl:3 = :1, b.jsonl:4 = :2"


def test_sum_of_reason_counts() -> None:
    one, other = ReasonCounts(), ReasonCounts()
    one.add("x", "a:1", 3)
    for number in range(150):
        other.add("x", f"b:{number}")
    other.add("y", "b:0")
    both = one + other
    assert both.counts == {"x": 153, "y": 1}
    assert both.locations["x"] == ["a:1", *(f"b:{number}" for number in range(99))]
    assert one.counts == {"x": 3}
    assert one.locations == {"x": ["a:1"]}


def test_duplicates_are_found_across_the_sources_of_a_set() -> None:
    report = DataReport("train")
    a, b = report.add_source("a.jsonl"), report.add_source("b.jsonl")
    a.keep("a.jsonl:1", exchange(2, 3), copies=3)
    a.keep("a.jsonl:2", exchange(2, 3, first_id=1))
    a.keep("a.jsonl:3", exchange(2, 3, weight=0.5))  # the same ids, but not the same weights
    a.keep("a.jsonl:4", exchange(3, 2))
    assert a.duplicates.total == 0
    # How spans divide the ids makes no difference.
    b.keep("b.jsonl:1", spans((1, "system", 0.0), (1, "user", 0.0), (1, "assistant", 1.0), (2, "tool", 1.0)))
    b.keep("b.jsonl:2", exchange(2, 3), copies=2)
    assert (a.distinct, b.distinct) == (4, 0)
    assert b.duplicates.locations == {"exact copy": ["b.jsonl:1 = a.jsonl:1", "b.jsonl:2 = a.jsonl:1"]}
    assert report.total().duplicates.total == 2
    assert b.warnings() == [
        "b.jsonl: 2 samples are exact copies of earlier ones: b.jsonl:1 = a.jsonl:1, :2 = a.jsonl:1"
    ]
    # Sets with an index of their own are independent.
    other = DataReport("eval").add_source("a.jsonl")
    other.keep("a.jsonl:1", exchange(2, 3))
    assert other.duplicates.total == 0


def test_record_of_several_copies_is_named_once() -> None:
    for count, what in ((1, "1 sample is an exact copy of an earlier one"), (3, "3 samples are exact copies of")):
        source = SourceReport("a")
        for where in ("a:1", "a:2"):
            for number in range(count):  # one for each answer of a conversation
                source.keep(where, exchange(2, 3, first_id=number), is_first=number == 0)
        [line] = source.warnings()
        assert line.startswith(f"a: {what}") and line.endswith(": a:2 = :1")


def test_duplicates_among_many_samples() -> None:
    source = SourceReport("a")
    numbers = [random.Random(0).randrange(1000) for _ in range(2)] + [index % 3000 for index in range(5000)]
    for line, number in enumerate(numbers):
        source.keep(f"a:{line}", exchange(1, 2, first_id=number))
    assert source.distinct == len(set(numbers))
    assert source.duplicates.total == len(numbers) - len(set(numbers))


def test_full_disk_raises_oserror(monkeypatch: pytest.MonkeyPatch) -> None:
    source = SourceReport("a")
    source.keep("a:1", exchange(1, 1))
    database = source.duplicate_index._database
    assert database is not None
    database.execute("PRAGMA max_page_count = 3")
    with pytest.raises(OSError, match="database or disk is full") as error:
        for number in range(1000):
            source.keep(f"a:{number}", exchange(1, 1, first_id=number))
    assert error.value.strerror == "database or disk is full"
    source.duplicate_index.close()
