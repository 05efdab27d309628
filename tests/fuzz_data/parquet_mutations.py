"""Mutations of Parquet files."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal
from io import BytesIO
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from data_utils.formats import FIELDS
from tests.fuzz_data.valid_files import (
    ALL_FIELDS,
    TABLES,
    Case,
    Expect,
    Mutations,
    Record,
    ValidFile,
    replace_at,
    value_at,
)

PARQUET_MUTATIONS = Mutations(TABLES)


def _columns(rows: Sequence[Record]) -> dict[str, Any]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: pa.array([row.get(name) for row in rows]) for name in names}


def _table(columns: dict[str, Any], **options: Any) -> bytes:
    buffer = BytesIO()
    pq.write_table(
        pa.Table.from_arrays(list(columns.values()), [name.rstrip("*") for name in columns]), buffer, **options
    )
    return buffer.getvalue()


_VALUES: tuple[tuple[Any, Any], ...] = (
    *((pa.int64(), 7), (pa.float16(), 1.5), (pa.bool_(), True), (pa.null(), None), (pa.string(), '{"a": [1, null]}')),
    *((pa.binary(), b"\xff\x00"), (pa.binary(2), b"ab"), (pa.decimal128(5, 2), Decimal("1.25"))),
    *((pa.list_(pa.string()), ["a", None]), (pa.struct([("a", pa.int8())]), {"a": 1})),
    *((pa.map_(pa.string(), pa.int32()), [("k", 1)]), (pa.timestamp("us", "UTC"), datetime(2020, 1, 2))),
)


@PARQUET_MUTATIONS.register
def _table_forms(file: ValidFile) -> Case:
    """The same rows in another encoding, with more columns."""
    random, columns = file.random, _columns(file.records)
    for name, column in columns.items():
        if column.type == pa.string():
            column = column.cast(random.choice([pa.string(), pa.large_string()]))
            columns[name] = column.dictionary_encode() if random.random() < 0.3 else column
    for number in range(random.randrange(3)):
        type_, value = random.choice(_VALUES)
        columns[f"extra {number}"] = pa.array([value, *[None] * (len(file.records) - 1)], type_)
    flags = {name: random.random() < 0.5 for name in ("use_dictionary", "write_page_checksum", "store_schema")}
    data = _table(
        dict(random.sample(list(columns.items()), len(columns))),
        compression=random.choice(["none", "snappy", "zstd", "gzip"]),
        row_group_size=random.randint(1, 10),
        data_page_version=random.choice(["1.0", "2.0"]),
        **flags,
    )
    return file.with_bytes(data, Expect.SAME, rows=file.records)


@PARQUET_MUTATIONS.register
def _table_values(file: ValidFile) -> Case:
    """A null value, or another text."""
    path = file.random_path()
    texts = ["", "\0", "x", "\x1b[31m", "🙂", None] if isinstance(value_at(file.record, path), str) else [None]
    rows = list(file.records)
    rows[file.index] = replace_at(file.record, path, file.random.choice(texts)) or {}
    return file.with_bytes(_table(_columns(rows)), Expect.ORACLE, rows=rows)


@PARQUET_MUTATIONS.register
def _table_types(file: ValidFile) -> Case:
    """A column of another type, in all or some rows."""
    columns, (type_, value) = _columns(file.records), file.random.choice(_VALUES)
    name = file.random.choice(list(columns))
    columns[name] = pa.array([value if file.random.random() < 0.8 else None for _ in file.records], type_)
    values = [dict(item) if item and pa.types.is_map(type_) else item for item in columns[name].to_pylist()]
    rows = [{**record, name: value} for record, value in zip(file.records, values, strict=True)]
    return file.with_bytes(_table(columns), Expect.ORACLE, rows=rows)


@PARQUET_MUTATIONS.register
def _table_columns(file: ValidFile) -> Case:
    """A column that is missing, renamed or repeated."""
    columns, change = _columns(file.records), file.random.choice(["missing", "renamed", "twice"])
    name, other = file.random.choice(list(columns)), file.random.choice([*ALL_FIELDS, "x\x1b\n"])
    if change == "twice":
        data = _table({**columns, f"{name}*": columns[name]})
        if name in FIELDS:
            return file.with_bytes(data, Expect.REFUSED)
        return file.with_bytes(data, Expect.SAME, rows=file.records)
    column = columns.pop(name)
    columns |= {other: column} if change == "renamed" else {}
    rows = [{key: value for key, value in row.items() if key != name} for row in file.records]
    if change == "renamed":
        rows = [{**row, other: record.get(name)} for row, record in zip(rows, file.records, strict=True)]
    return file.with_bytes(_table(columns), Expect.ORACLE, rows=rows)


@PARQUET_MUTATIONS.register
def _table_broken(file: ValidFile) -> Case:
    """No rows, text that is not UTF-8, a year that Python has not in an unused column, or a truncated file."""
    columns, change = _columns(file.records), file.random.choice(["no rows", "no UTF-8", "no year", "cut"])
    if change == "no rows":
        columns = {name: column[:0] for name, column in columns.items()}
    elif change == "no UTF-8":
        bad = pa.array([b"\xff\xfe a"] * len(file.records), pa.binary()).view(pa.string())
        columns[file.random.choice([name for name in columns if name in FIELDS])] = bad
    elif change == "no year":
        columns["when"] = pa.array([10**12] * len(file.records), pa.timestamp("s"))
        return file.with_bytes(_table(columns), Expect.SAME, rows=file.records)
    data = _table(columns)
    return file.with_bytes(data[: file.random.randrange(1, len(data))] if change == "cut" else data, Expect.REFUSED)


@PARQUET_MUTATIONS.register
def _table_bytes(file: ValidFile) -> Case:
    """Changed bytes: in pages with checksums, or anywhere in a file without."""
    has_checksums = file.random.random() < 0.5
    compression = file.random.choice(["none", "snappy", "zstd"])
    data = bytearray(_table(_columns(file.records), write_page_checksum=has_checksums, compression=compression))
    [footer] = struct.unpack("<I", data[-8:-4])
    for _ in range(file.random.randint(1, 4)):
        index = file.random.randrange(4, len(data) - 8 - footer if has_checksums else len(data))
        data[index] = file.random.randrange(256)
    return file.with_bytes(
        bytes(data), Expect.ORACLE_OR_REFUSED if has_checksums else Expect.NO_CRASH, rows=file.records
    )
