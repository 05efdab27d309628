"""Objects over several lines, and a list of records in an object."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from data_utils.files import Location, read_records
from data_utils.json_stream import json_records
from errors import DataError
from tests.data_files import as_text, fault, pieces, values, write

RECORDS: list[dict[str, Any]] = [{"prompt": f"{number}?", "response": "Yes.", "id": [number]} for number in range(4)]
INDENTED = [json.dumps(record, indent=2) for record in RECORDS]


@pytest.mark.parametrize("separator", ["\n", "", "\n\n  ", "\r\n"])
def test_objects_over_several_lines_are_read(tmp_path: Path, separator: str) -> None:
    path = write(tmp_path / "a.jsonl", "\ufeff\n" + separator.join(INDENTED) + "\n")
    assert values(path) == RECORDS
    first, *_, last = [location for location, _ in read_records(path)]
    assert first == Location(str(path), 2, 1) and (last.record, last.line) == (4, last.line) and last.line is not None
    assert path.read_text().splitlines()[last.line - 1].lstrip().endswith("{")


WRAPPED = {
    "indented": lambda records: json.dumps({"train": records}, indent=2),
    "on one line": lambda records: json.dumps({"data": records}),
    "after other fields": lambda records: json.dumps({"version": "1.0", "info": {"a": [1]}, "data": records}),
    "before other fields": lambda records: json.dumps(
        {"conversations": records, "license": "x", "n": [1, 2]}, indent=1
    ),
    "between lines": lambda records: '{"rows":\n[' + ",\n".join(map(json.dumps, records)) + "]\n}\n",
}


@pytest.mark.parametrize("form", WRAPPED)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz"])
def test_list_of_records_in_an_object_is_read(tmp_path: Path, form: str, name: str) -> None:
    text = WRAPPED[form](RECORDS).encode()
    path = write(tmp_path / name, gzip.compress(text) if name.endswith("gz") else text)
    assert values(path) == RECORDS
    assert [location.record for location, _ in read_records(path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("size", [1, 7, 64, 1 << 18])
@pytest.mark.parametrize("form", WRAPPED)
def test_chunk_size_does_not_change_wrapped_records(form: str, size: int) -> None:
    data = WRAPPED[form](RECORDS).encode()
    expected = as_text(json_records(iter([data]), "a"))
    assert [value for _, value in expected] == RECORDS
    assert as_text(json_records(pieces(data, size), "a")) == expected
    data = "\n".join(INDENTED).encode()
    assert as_text(json_records(pieces(data, size), "a")) == as_text(json_records(iter([data]), "a"))


def test_wrapped_list_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The object may be larger than the largest record."""
    monkeypatch.setattr("data_utils.json_stream.MAX_RECORD_BYTES", 2000)
    monkeypatch.setattr("data_utils.files.CHUNK_BYTES", 100)
    records = [{"prompt": "x" * 500, "response": str(number)} for number in range(50)]
    assert values(write(tmp_path / "a.json", json.dumps({"data": records}, indent=1))) == records
    assert values(write(tmp_path / "b.jsonl", "\n".join(json.dumps(record, indent=1) for record in records))) == records
    records[7]["prompt"] = "x" * 3000
    for text in (json.dumps({"data": records}), "\n".join(json.dumps(record, indent=1) for record in records)):
        assert "one record, or the white space before it, has more than" in fault(write(tmp_path / "c.json", text))


def test_record_with_a_list_of_records_in_a_field_is_one_record(tmp_path: Path) -> None:
    record = {"examples": RECORDS, **RECORDS[0]}
    assert values(write(tmp_path / "a.jsonl", f"{json.dumps(record)}\n{json.dumps(RECORDS[1])}\n")) == [
        record,
        RECORDS[1],
    ]
    assert values(write(tmp_path / "a.json", json.dumps(record, indent=1))) == [record]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"},\n{"prompt": "b"},\n', ":1:16: a comma between objects that are in no list. Put [ before"),
        ('{\n "a": 1,\n "b": 2,,\n}', ":3:9: not valid JSON: Expecting property name"),
        (
            '{\n "prompt": "a",\n "response": "b"\n},\n{\n',
            ":4:2: a comma between objects that are in no list. Put [ before",
        ),
        ('{\n "a": 1\n}\n{\n "a": x}', ":5:7: not valid JSON: Expecting value"),
        (
            '{"data": [{"prompt": "a", "response": "b"},\n{"prompt" 3}]}',
            ":2:11: not valid JSON: Expecting ':' delimiter",
        ),
        ('{"data": [{"prompt": "a", "response": "b"}]', ":1:44: not valid JSON: expecting ',' or '}' after the list"),
        ('{"data": [{"prompt": "a", "response": "b"}]}\n{}', ":2:1: not valid JSON: more text after the object with"),
        (
            '{"train": [{"prompt": "a", "response": "b"}],\n"test": [{"prompt": "c", "response": "d"}]}',
            ":2: 'test' is a second list of records, after 'train'. Write each list to a file of its own",
        ),
        ('{"data": [{"prompt": "a", "response": "b"}], 3: 4}', ":1:47: not valid JSON: expecting the name"),
        ('{"data": [{"prompt": "a", "response": "b"}], "x" 4}', ":1:50: not valid JSON: expecting ':' after the name"),
    ],
)
def test_fault_in_such_a_text_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "a.jsonl", text)
    assert fault(path).startswith(f"{path}{message}")


@pytest.mark.parametrize(
    ("first", "fault_at"),
    [
        ('{"a": 1', ":1:"),
        ('{"a":', ":1:"),
        ('{"a": "b', ":1:"),
        ('{"a": [1,', ":1:"),
        ("{", ":1:"),
        ('{"a": 1},', ":1:"),
    ],
)
def test_broken_first_line_of_lines_is_a_fault_of_its_own(tmp_path: Path, first: str, fault_at: str) -> None:
    lines = [first, *map(json.dumps, RECORDS)]
    path = write(tmp_path / "a.jsonl", "\n".join(lines))
    (_, broken), *others = read_records(path)
    assert isinstance(broken, DataError) and str(broken).startswith(f"{path}:1:")
    assert [value for _, value in others] == RECORDS
