"""Parquet files whose few bytes stand for gigabytes: refused by name, with bounded memory, unlike honest ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_utils import parquet, parquet_limits
from data_utils.files import read_records
from data_utils.formats import FIELDS
from data_utils.parquet_limits import value_sizes
from errors import DataError
from tests.commands import run_well
from tests.data_files import fault, values

TURN = pa.struct([("role", pa.string()), ("content", pa.string())])
GOOD = {"prompt": ["a", "b"], "response": ["c", "d"]}


def same(value: Any, count: int) -> pa.Array:
    """Return an array of one value that is stored once."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array([value], pa.large_string()))


def messages(content: pa.Array, rows: int = 1) -> pa.Array:
    """Return lists of messages with these contents, one after the other."""
    turns = pa.StructArray.from_arrays([same("user", len(content)), content], ["role", "content"])
    each = len(content) // rows
    return pa.ListArray.from_arrays(pa.array(range(0, len(content) + 1, each), pa.int32()), turns)


def bomb_of_rows(path: Path, size: int, count: int) -> None:
    pq.write_table(pa.table({"prompt": same("a" * size, count), "response": same("b", count)}), path)


def bomb_of_messages(path: Path, size: int, count: int) -> None:
    pq.write_table(pa.table({"messages": messages(same("a" * size, count))}), path)


def bomb_of_prefixes(path: Path, size: int, count: int) -> None:
    content = pa.array(["a" * size] * count)
    encodings = {"messages.list.element.content": "DELTA_BYTE_ARRAY", "messages.list.element.role": "PLAIN"}
    table = pa.table({"messages": messages(content)})
    pq.write_table(table, path, use_dictionary=False, column_encoding=encodings, compression="zstd")


def bomb_of_pages(path: Path, size: int, count: int) -> None:
    table = pa.table({"prompt": ["a" * size] * count, "response": ["b"] * count})
    pq.write_table(table, path, compression="zstd", use_dictionary=False, write_batch_size=1)


def bomb_of_levels(path: Path, size: int, count: int) -> None:
    lists = pa.ListArray.from_arrays(pa.array([0, size * count], pa.int32()), pa.nulls(size * count, pa.int8()))
    pq.write_table(pa.table({"messages": lists}), path)


def bomb_of_nulls(path: Path, size: int, count: int) -> None:
    pq.write_table(pa.table({"prompt": pa.nulls(size * count, pa.string())}), path)


def bomb_of_fixed_size(path: Path, size: int, count: int) -> None:
    pq.write_table(pa.table({"prompt": pa.nulls(2, pa.binary(size * count))}), path)


BOMBS: dict[str, Callable[[Path, int, int], None]] = {
    "rows": bomb_of_rows, "messages": bomb_of_messages, "prefixes": bomb_of_prefixes, "pages": bomb_of_pages,
    "levels": bomb_of_levels, "nulls": bomb_of_nulls, "fixed size": bomb_of_fixed_size,
}  # fmt: skip


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_limits, "_FREE_BYTES", 1 << 20)
    monkeypatch.setattr(parquet_limits, "_FREE_VALUES", 10_000)
    monkeypatch.setattr(parquet_limits, "_MAX_WIDTH", 1 << 20)
    monkeypatch.setattr("data_utils.json_stream.MAX_RECORD_BYTES", 1 << 18)


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("name", BOMBS)
def test_bomb_of_each_kind_is_refused_by_name(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    BOMBS[name](path, 20_000, 200)
    assert path.stat().st_size < 50_000
    records = list(read_all(path))
    assert len(records) == 1 and str(path) in str(records[0])
    text = str(records[0])
    assert text.startswith(f"{path} (row group 1): could take too much memory: ")


def read_all(path: Path) -> list[object]:
    """Return the records, up to and including the fault that ends the reading."""
    read: list[object] = []
    try:
        for _, record in read_records(path, fields=FIELDS):
            read.append(record)
    except DataError as error:
        read.append(error)
    return read


READ = """
import resource, sys, time
from data_utils.dataset import FIELDS
from data_utils.files import read_records
from errors import DataError
resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, 3 << 30))
import pyarrow.parquet
start, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    message = "read"
    try:
        for _, value in read_records(path, fields=FIELDS):
            if isinstance(value, DataError):
                raise value
    except DataError as error:
        message = str(error)
    now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print((now - peak) >> 10, time.process_time() - start, message.replace(path, "FILE"), sep="\\t")
"""


def test_memory_and_time_are_bounded(tmp_path: Path) -> None:
    """Seven gigabytes in two kilobytes, as rows and as messages of one row, and such a column that is not used."""
    paths = [tmp_path / name for name in ("rows.parquet", "messages.parquet", "unused.parquet")]
    bomb_of_rows(paths[0], 7_000_000, 1000)
    bomb_of_messages(paths[1], 7_000_000, 1000)
    unused = same("a" * 7_000_000, 1000)
    used = {name: pa.array([str(number) for number in range(1000)]) for name in ("prompt", "response")}
    pq.write_table(pa.table({**used, "page": unused}), paths[2])
    assert all(path.stat().st_size < 400_000 for path in paths)
    lines = [line.split("\t") for line in run_well("-c", READ, *paths, is_new=True).stdout.splitlines()]
    for _, _, message in lines[:2]:
        assert message.startswith("FILE (row group 1): could take too much memory: its ")
    assert lines[2][2] == "read"
    for megabytes, seconds, message in lines:
        assert int(megabytes) < 300 and float(seconds) < 10, message


def test_only_used_columns_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({**GOOD, "when": pa.array([-(10**17)] * 2, pa.timestamp("ms")), "system.x": ["x", "y"]})
    pq.write_table(table, path)
    rows = [{"prompt": "a", "response": "c"}, {"prompt": "b", "response": "d"}]
    assert [record for _, record in read_records(path, fields=FIELDS)] == rows
    assert "the column 'when' cannot be read" in fault(path)
    twice = pa.Table.from_arrays([*map(pa.array, GOOD.values()), pa.array([1, 2]), pa.array([3, 4])], [*GOOD, "x", "x"])
    pq.write_table(twice, path)
    assert [record for _, record in read_records(path, fields=FIELDS)] == rows
    pq.write_table(pa.table({"page": ["a"], "note": ["b"]}), path)  # none is used: all are shown in the message
    assert [record for _, record in read_records(path, fields=FIELDS)] == [{"page": "a", "note": "b"}]


def test_large_row_is_a_fault_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_utils.json_stream.MAX_RECORD_BYTES", 1000)
    path = tmp_path / "a.parquet"
    lengths = [10, 900, 2000, 5, 980, 990, 1001, 3]
    pq.write_table(pa.table({"prompt": ["x" * length for length in lengths]}), path)
    read = [record for _, record in read_records(path)]
    large = {number for number, record in enumerate(read, 1) if isinstance(record, DataError)}
    assert large == {3, 7}
    assert str(read[2]) == (
        f"{path} (record 3): the record has more than 0.000953674 MiB of text. Check the file, or split the record"
    )
    assert [len(record["prompt"]) for record in read if isinstance(record, dict)] == [10, 900, 5, 980, 990, 3]


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("encoding", ["dictionary", "PLAIN", "DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"])
def test_honest_tables_are_read_whatever_their_encoding(encoding: str, version: str, tmp_path: Path) -> None:
    """More bytes than are free, in row groups and pages of all sizes."""
    path = tmp_path / "a.parquet"
    texts = [f"{number} " * (number % 300) for number in range(2000)]
    table = pa.table({"prompt": texts, "response": texts[::-1], "n": range(2000)})
    options: dict[str, Any] = {"use_dictionary": encoding == "dictionary", "dictionary_pagesize_limit": 1 << 16}
    if encoding != "dictionary":
        options["column_encoding"] = {"prompt": encoding, "response": encoding}
    for rows, page in ((2000, 1 << 14), (700, 1 << 16)):
        pq.write_table(
            table,
            path,
            row_group_size=rows,
            data_page_size=page,
            data_page_version=version,
            compression="none",
            **options,
        )
        assert values(path) == table.to_pylist()


def test_sizes_of_values() -> None:
    lists = pa.array([["ab", None], [], None, ["c"]])
    assert value_sizes(pa.array(["ab", None, "é"])).tolist() == [6, 4, 6]
    assert value_sizes(pa.array(["ab", None, "ab"]).dictionary_encode()).tolist() == [6, 4, 6]
    assert value_sizes(lists).tolist() == [14, 4, 4, 9]
    assert value_sizes(lists[1:]).tolist() == [4, 4, 9]
    assert value_sizes(pa.array([{"role": "a", "n": [1, 2]}, None])).tolist() == [4 + 5 + 5 + 12, 4 + 5 + 4 + 4]
    assert value_sizes(pa.array([[("k", "v")]], pa.map_(pa.string(), pa.string()))).tolist() == [14]
    assert value_sizes(pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.int8(), 2))[1:]).tolist() == [12, 12]
    assert value_sizes(pa.array([1.5, None])).tolist() == [4, 4]


def test_page_headers_that_lie_are_faults(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": ["abc"] * 9, "response": ["d"] * 9}), path, compression="none")
    data = path.read_bytes()
    for index in range(4, 60):
        for byte in (0, 0x0F, 0x19, 0x7F, 0x80, 0xFF):
            path.write_bytes(data[:index] + bytes([byte]) + data[index + 1 :])
            for record in read_all(path):
                assert isinstance(record, (dict, DataError))


def test_batches_are_small_if_pages_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    def chunk(**sizes: int) -> parquet_limits.Chunk:
        return parquet_limits.Chunk("a", parquet_limits.ChunkSizes(**sizes), is_nested=False)

    usual = chunk(compressed=1 << 28, uncompressed=1 << 30, largest=1 << 20, dictionary=1 << 20, values=1_000_000)
    assert parquet_limits.rows_at_once([usual], parquet._BATCH_ROWS) == 128
    large = chunk(compressed=1 << 28, uncompressed=1 << 30, largest=100 << 20, dictionary=0, values=1_000_000)
    assert parquet_limits.rows_at_once([large], 256) == 1
    small = chunk(compressed=1 << 20, uncompressed=1 << 22, largest=1 << 20, dictionary=0, values=1_000_000)
    assert parquet_limits.rows_at_once([small], 256) == 256
