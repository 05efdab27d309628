"""Blocks of records reach another process unchanged, and count as their records do one by one."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

from data_utils.blocks import Records
from data_utils.json_stream import JsonLine
from data_utils.location import Location
from data_utils.report.source_report import SourceReport
from tests.reports import exchange
from tests.unit.data_utils.test_workers import reader


def test_records_reach_another_process_unchanged() -> None:
    places = [Location("a.jsonl", line) for line in (1, 3)]
    lines = Records((place, JsonLine(b'{"text": "x"}', place, 2, 70)) for place in places)
    values = Records([(Location("b.json", 3, 1), {"text": "x"}), (Location("b.json", 4, 2), [1])])
    rows = Records([(Location("c.parquet", None, 1), {"text": "x"})])
    for records in (lines, values, rows):
        again = pickle.loads(pickle.dumps(records))
        assert type(again) is Records and again == records


def test_counts_of_blocks_add_up_to_those_of_their_records() -> None:
    whole, total = SourceReport("a", duplicate_index=None), SourceReport("a", duplicate_index=None)
    for start in range(0, 500, 50):
        part = SourceReport.part()
        for number in range(start, start + 50):
            for report in (whole, part):
                report.skip(f"a:{number}", f"reason {number * 7 % 60}", copies=number % 3 + 1)
                report.keep(f"a:{number}", exchange(2, number % 9 + 1), [f"name {number % 4}"], answers=(2, number % 2))
                report.count_too_long(number, number // 2)
        total += part
    assert len(total.skipped.counts) == 51
    assert total == whole


def test_copies_are_found_in_the_order_of_the_records_of_both_sets(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    turns = [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"}]
    path.write_text(f"{json.dumps({'conversations': turns})}\n" * 40)
    data = reader(1, path, eval_share=0.4)
    kept = list(data.read())
    assert [each.where.line for each in kept] == [*range(1, 41)]
    assert [each.set_name for each in kept].count("eval") == 16
    totals = [report.total() for report in data.reports.values()]
    assert sum(total.distinct for total in totals) == 1
    copies = [place for total in totals for place in total.duplicates.locations["exact copy"]]
    assert sorted(copies) == sorted(f"{path}:{line} = {path}:1" for line in range(2, 41))
