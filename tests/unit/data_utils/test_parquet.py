"""Rows of Parquet files, and files that cannot be read."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from console import pip_command
from data_utils.files import Location, read_records
from errors import DataError
from tests.data_files import FORMAT, fault, write


def test_rows_are_objects_of_plain_values(tmp_path: Path) -> None:
    turn = pa.struct([("role", pa.string()), ("call", pa.struct([("name", pa.string()), ("id", pa.int8())]))])
    schema = pa.schema(
        [
            ("turns", pa.list_(turn)),
            ("counts", pa.map_(pa.string(), turn)),
            ("text", pa.string()),
            ("tools", pa.large_string()),
            ("kind", pa.dictionary(pa.int32(), pa.string())),
            ("when", pa.timestamp("ns")),
            ("numbers", pa.list_(pa.float64())),
        ]
    )
    rows = [
        {
            "turns": [
                {"role": "a", "call": {"name": "f", "id": None}},
                None,
                {"role": None, "call": None},
                {"role": ""},
            ],
            "counts": [("x", {"role": "b"}), ("y", None)],
            "text": "null",
            "tools": '[{"a": null}]',
            "kind": "k",
            "when": datetime.datetime(2024, 5, 6),
            "numbers": [1.0, None],
        },
        {"turns": [], "counts": [], "text": None},
    ]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema), path)
    assert list(read_records(path)) == [
        (
            Location(str(path), record=1),
            {
                "turns": [{"role": "a", "call": {"name": "f"}}, None, {}, {"role": ""}],
                "counts": {"x": {"role": "b"}, "y": None},
                "text": "null",
                "tools": '[{"a": null}]',
                "kind": "k",
                "when": datetime.datetime(2024, 5, 6),
                "numbers": [1.0, None],
            },
        ),
        (Location(str(path), record=2), {"turns": [], "counts": {}}),
    ]


def test_rows_are_numbered_across_row_groups_and_batches(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": list(range(1500))}), path, row_group_size=700)
    assert list(read_records(path)) == [(Location(str(path), record=n + 1), {"n": n}) for n in range(1500)]


def test_columns_that_cannot_be_converted(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"

    def fault_of(table: pa.Table, **options: Any) -> str:
        pq.write_table(table, path, **options)
        return fault(path).removeprefix(str(path))

    twice = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["\x1b[31m", "\x1b[31m"])
    assert fault_of(twice) == ": two columns are named '\\x1b[31m'. Rename one of them"
    inner = pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    assert fault_of(pa.table({"s": inner})).startswith(
        " (record 1): the column 's' cannot be read from this record on (Value"
    )
    assert fault_of(pa.table({"a": pa.array([], pa.string())})) == ": the file contains no conversations" + FORMAT
    keys = pa.array([[("a", 1), ("a", 2)]], pa.map_(pa.string(), pa.int8()))
    assert fault_of(pa.table({"m": keys})) == (
        " (record 1): the column 'm' cannot be read from this record on (ValueError: a map has a repeated key). "
        "Leave the column out, or write it as strings"
    )
    early = pa.array([0] * 300 + [-(10**17)], pa.timestamp("ms"))
    assert fault_of(pa.table({"t": early})).startswith(
        " (record 257): the column 't' cannot be read from this record on ("
    )
    bytes_column = pa.array([b"a", b"\xff"], pa.binary()).view(pa.string())
    assert fault_of(pa.table({"t": bytes_column})).startswith(
        " (record 1): the column 't' cannot be read from this record on (U"
    )


def test_broken_parquet_files(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"t": [f"{number} text" for number in range(1500)]})
    pq.write_table(table, path, row_group_size=500, compression="none", use_dictionary=False, write_page_checksum=True)
    content = bytearray(path.read_bytes())
    content[content.index(b"1234 text")] = ord("7")
    write(path, bytes(content))
    records = read_records(path)
    read = [next(records)[1] for _ in range(1000)]
    assert read == table.to_pylist()[:1000]
    with pytest.raises(DataError) as error:
        list(records)
    assert str(error.value).startswith(f"{path} (record 1001): the Parquet file cannot be read (")
    assert str(error.value).endswith("). Download or write it again")
    for cut in (4, 50, len(content) // 2, len(content) - 1):
        assert fault(write(path, bytes(content[:cut]))).startswith(f"{path}: the Parquet file cannot be read (")


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": [1]}), path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert fault(path).startswith(f"{path}: a Parquet file needs pyarrow (")
    assert fault(path).endswith(f"). {pip_command('pyarrow')}")
