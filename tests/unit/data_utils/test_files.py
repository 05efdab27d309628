"""Files that are read as data, and equal records from each kind of file."""

from __future__ import annotations

import gzip
import json
import logging
import os
import re
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_utils import files
from data_utils.files import Location, data_files, read_records
from errors import DataError
from tests.data_files import fault, values, write

RECORDS: list[Any] = [
    {"id": "a", "turns": [{"from": "user", "value": '你好 "é" \\ \n 🙂'}], "score": -1.5e-3, "tags": []},
    {"id": "b", "turns": [], "score": 1e300, "tags": ["x", "\u2028\u0085"]},
]


def test_location_as_text() -> None:
    assert str(Location("a.json")) == "a.json"
    assert str(Location("a.jsonl", 12)) == "a.jsonl:12"
    assert str(Location("a.json", 12, 3)) == "a.json:12 (record 3)"
    assert str(Location("a.parquet", record=7)) == "a.parquet (record 7)"


def test_all_kinds_of_files_give_the_same_records(tmp_path: Path) -> None:
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()
    contents = {
        "list.json": json.dumps(RECORDS).encode(),
        "indented.JSON": b"\xef\xbb\xbf" + json.dumps(RECORDS, indent=4, ensure_ascii=False).encode(),
        "crlf.json": json.dumps(RECORDS, indent=4).replace("\n", "\r\n").encode(),
        "lines.jsonl": lines,
        "lines.ndjson": b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n"),
        "list.json.gz": gzip.compress(json.dumps(RECORDS).encode()),
        "lines.jsonl.gz": gzip.compress(lines),
        "members.ndjson.gz": gzip.compress(lines[:99]) + gzip.compress(b"") + gzip.compress(lines[99:]) + bytes(512),
    }
    paths = [write(tmp_path / name, content) for name, content in contents.items()]
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "table.parquet")
    for path in [*paths, tmp_path / "table.parquet"]:
        assert values(path) == RECORDS, path.name
    assert [str(location)[len(str(paths[1])) :] for location, _ in read_records(paths[1])] == [
        ":2 (record 1)",
        ":13 (record 2)",
    ]
    assert data_files(tmp_path) == sorted([*paths, tmp_path / "table.parquet"])


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte order mark"])
def test_content_decides_not_the_file_name(tmp_path: Path, mark: str) -> None:
    as_list = write(tmp_path / "list.jsonl", mark + " " * 5000 + '\n[{"a": "你好"}]\n')
    as_lines = write(tmp_path / "lines.txt", mark + '{"a": "你好"}\n')
    packed = write(tmp_path / "packed.json", gzip.compress(as_lines.read_bytes()))
    assert list(read_records(as_list)) == [(Location(str(as_list), 2, 1), {"a": "你好"})]
    assert list(read_records(str(as_lines))) == [(Location(str(as_lines), 1), {"a": "你好"})]
    assert list(read_records(packed)) == [(Location(str(packed), 1), {"a": "你好"})]
    pq.write_table(pa.table({"a": ["你好"]}), tmp_path / "table.json")
    assert values(tmp_path / "table.json") == [{"a": "你好"}]


@pytest.mark.parametrize(("name", "kind"), [("a.json.gz", "gzip"), ("a.parquet", "Parquet")])
def test_ending_that_does_not_match_the_content_is_refused(tmp_path: Path, name: str, kind: str) -> None:
    path = write(tmp_path / name, '{"a": 1}\n')
    assert fault(path) == (
        f"{path}: the name ends in {path.suffix}, but the content is not a {kind} file. Download or write the file "
        "again, or rename it"
    )


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert fault(tmp_path / "nowhere.json") == f"{tmp_path}/nowhere.json: no such file. Check the path"
    assert fault(tmp_path) == (
        f"{tmp_path}: is a folder. Name a file: .json, .jsonl, .ndjson, .json.gz, .jsonl.gz, .ndjson.gz, .parquet, "
        ".txt, .txt.gz"
    )
    below_a_file = write(tmp_path / "a.json", "[1]") / "b.json"
    assert fault(below_a_file) == f"{below_a_file}: cannot be read (Not a directory)"


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="only Linux has it")
def test_read_error_of_the_system() -> None:
    assert fault(Path("/proc/self/mem")) == "/proc/self/mem: cannot be read (Input/output error)"


def test_memory_does_not_grow_with_file_size(tmp_path: Path) -> None:
    def peak(path: Path, count: int) -> int:
        tracemalloc.start()
        pool = pa.default_memory_pool()
        read = most = 0
        for _ in read_records(path):
            read += 1
            most = max(most, pool.bytes_allocated())
        python = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert read == count
        return python + most

    record = {"id": "a", "turns": [{"role": "user", "content": "x" * 900}]}
    peaks: dict[str, list[int]] = {}
    for count in (500, 2_000, 20_000):
        records = [{**record, "number": number} for number in range(count)]
        lines = [json.dumps(record) for record in records]
        write(tmp_path / "list.json", f"[{','.join(lines)}]")
        write(tmp_path / "lines.jsonl", "\n".join(lines))
        write(tmp_path / "lines.jsonl.gz", gzip.compress("\n".join(lines).encode(), 1))
        pq.write_table(pa.Table.from_pylist(records), tmp_path / "table.parquet", row_group_size=5_000)
        for path in data_files(tmp_path):
            peaks.setdefault(path.name, []).append(peak(path, count))
    assert len(peaks) == 4
    # The first round fills caches and is not compared.
    for name, (_, small, large) in peaks.items():
        assert large - small < 1_000_000, (name, small, large)


def test_broken_gzip_files(tmp_path: Path) -> None:
    packed = gzip.compress(b"".join(b'{"a": %d}\n' % number for number in range(50_000)))
    bad_sum = bytearray(packed)
    bad_sum[-6] ^= 1
    middle = bytearray(packed)
    middle[len(packed) // 2 : len(packed) // 2 + 50] = bytes(50)
    for content, what in (
        (packed[:-9], "unexpected end of the file"),
        (packed[: len(packed) // 2], "unexpected end of the file"),
        (packed[:5], "unexpected end of the file"),
        (bytes(bad_sum), "Error -3 while decompressing data: incorrect data check"),
        (packed + b"not gzip", "Error -3 while decompressing data: incorrect header check"),
        (packed + packed[:100], "unexpected end of the file"),
        (b"\x1f\x8b\x01" + packed[3:], "Error -3 while decompressing data: unknown compression method"),
    ):
        path = write(tmp_path / "a.jsonl.gz", content)
        assert fault(path) == f"{path}: the gzip file is broken ({what}). Download or pack it again"
    path = write(tmp_path / "a.jsonl.gz", bytes(middle))
    assert fault(path).startswith(f"{path}: the gzip file is broken (Error -3 while decompressing data: ")


def test_complete_records_of_a_truncated_gzip_file_are_read(tmp_path: Path) -> None:
    packer = zlib.compressobj(wbits=31)
    packed = packer.compress(b'{"a": 1}\n{"a": 2}\n{"a"') + packer.flush(zlib.Z_FULL_FLUSH)
    records = read_records(write(tmp_path / "a.jsonl.gz", packed))
    assert [next(records)[1], next(records)[1]] == [{"a": 1}, {"a": 2}]
    with pytest.raises(DataError, match="unexpected end of the file"):
        next(records)


def test_progress_adds_up_to_the_file_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "CHUNK_BYTES", 1000)
    records = [{"number": number, "text": os.urandom(20).hex()} for number in range(1000)]
    text = json.dumps(records, indent=0).encode()
    write(tmp_path / "a.json", text + b"\n" * 500)
    write(tmp_path / "b.jsonl", "\n".join(map(json.dumps, records)))
    write(tmp_path / "c.json.gz", gzip.compress(text) + bytes(5000))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "d.parquet")
    for path in data_files(tmp_path):
        steps: list[int] = []
        halfway = 0
        for location, value in read_records(path, steps.append):
            if value == records[500]:
                halfway = sum(steps)
            assert location.path == str(path)
        size = path.stat().st_size
        assert sum(steps) == size, path
        assert len(steps) >= 4
        assert min(steps) >= 0
        assert 0.2 * size < halfway < 0.8 * size


def test_data_files_of_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "b" / ".cache").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "b", target_is_directory=True)
    names = ["b/2.jsonl", "b/10.JSON.gz", "a.ndjson", "z.parquet"]
    others = [".hidden.json", "b/.cache/x.json", "README.md", "b/\x1b.md", "b/x.json.bak", "json", "n1", "n2"]
    for name in names + others:
        write(tmp_path / name, "[1]")
    (tmp_path / "b" / "linked.json").symlink_to(tmp_path / "a.ndjson")
    with caplog.at_level(logging.INFO):
        paths = data_files(str(tmp_path))
    assert paths == [
        tmp_path / name for name in ("a.ndjson", "b/10.JSON.gz", "b/2.jsonl", "b/linked.json", "z.parquet")
    ]
    assert caplog.messages == [
        f"{tmp_path}: ignored 7 entries that are not data files: "
        "'README.md', 'b/\\x1b.md', 'b/x.json.bak', 'json', 'link', ..."
    ]


def test_a_file_is_a_data_file_whatever_its_name(tmp_path: Path) -> None:
    path = write(tmp_path / ".notes", "x")
    assert data_files(path) == [path]


def test_folder_without_data_files(tmp_path: Path) -> None:
    write(tmp_path / "a.md", "[1]")
    with pytest.raises(DataError) as error:
        data_files(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: the folder contains no data files. Their names end in .json, .jsonl, .ndjson, .json.gz, "
        ".jsonl.gz, .ndjson.gz, .parquet, .txt, .txt.gz"
    )
    with pytest.raises(DataError, match=r"/nowhere: no such file\. Check the path$"):
        data_files(tmp_path / "nowhere")


def test_file_name_that_is_too_long(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 300)
    with pytest.raises(DataError, match=r"x: cannot be read \(File name too long\)$"):
        data_files(long)
    assert fault(long) == f"{long}: cannot be read (File name too long)"


def test_random_bytes_are_faults(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", re.sub(rb"[\x1f{\[]", b"", os.urandom(4096)))
    for location, value in read_records(path):
        assert isinstance(value, (DataError, int)), location
