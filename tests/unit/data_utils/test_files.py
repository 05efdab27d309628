"""Which files are data, and what is read from them: the same records from each kind, or the line that says why not."""

from __future__ import annotations

import datetime
import gzip
import json
import logging
import os
import re
import sys
import tracemalloc
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_utils import files, json_stream
from data_utils.files import Location, data_files, read_records
from data_utils.json_stream import json_records
from errors import DataError
from tests.commands import run_well

RECORDS: list[Any] = [
    {"id": "a", "turns": [{"from": "user", "value": '你好 "é" \\ \n 🙂'}], "score": -1.5e-3, "tags": []},
    {"id": "b", "turns": [], "score": 1e300, "tags": ["x", "\u2028\u0085"]},
]
FORMAT = ". A data file is UTF-8: one JSON list of conversations, or one JSON object per line"
BROKEN = "not valid JSON: "


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def values(path: Path) -> list[object]:
    return [value for _, value in read_records(path)]


def fault(path: Path) -> str:
    """The fault behind which nothing is read."""
    with pytest.raises(DataError) as error:
        list(read_records(path))
    assert "\n" not in str(error.value)
    return str(error.value)


def as_text(items: Iterable[tuple[Location, object]]) -> list[tuple[str, object]]:
    """Faults of single records as their text, which can be compared."""
    return [(str(place), str(value) if isinstance(value, DataError) else value) for place, value in items]


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))


# Places


def test_a_place_as_text() -> None:
    assert str(Location("a.json")) == "a.json"
    assert str(Location("a.jsonl", 12)) == "a.jsonl:12"
    assert str(Location("a.json", 12, 3)) == "a.json:12 (record 3)"
    assert str(Location("a.parquet", record=7)) == "a.parquet (record 7)"


def test_a_list_gives_each_records_line_and_number(tmp_path: Path) -> None:
    record = {"id": "a", "conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello!"}]}
    path = write(tmp_path / "chats.json", json.dumps([record, 2, {"a": ["b", {}]}], indent=1))
    assert list(read_records(path)) == [
        (Location(str(path), 2, 1), record),
        (Location(str(path), 15, 2), 2),
        (Location(str(path), 16, 3), {"a": ["b", {}]}),
    ]


def test_lines_give_their_number_and_blank_ones_are_skipped(tmp_path: Path) -> None:
    path = write(tmp_path / "chats.jsonl", '\n{"a": "\u2028\u0085 line"}\r\n   \n\t{"b": 2} \n"c"\n4')
    assert list(read_records(path)) == [
        (Location(str(path), 2), {"a": "\u2028\u0085 line"}),
        (Location(str(path), 4), {"b": 2}),
        (Location(str(path), 5), "c"),
        (Location(str(path), 6), 4),
    ]


# The kinds of files


def test_all_kinds_hold_the_same_records(tmp_path: Path) -> None:
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
    assert [str(place)[len(str(paths[1])) :] for place, _ in read_records(paths[1])] == [
        ":2 (record 1)",
        ":13 (record 2)",
    ]
    assert data_files(tmp_path) == sorted([*paths, tmp_path / "table.parquet"])


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte order mark"])
def test_the_content_decides_not_the_name(tmp_path: Path, mark: str) -> None:
    as_list = write(tmp_path / "list.jsonl", mark + " " * 5000 + '\n[{"a": "你好"}]\n')
    as_lines = write(tmp_path / "lines.txt", mark + '{"a": "你好"}\n')
    packed = write(tmp_path / "packed.json", gzip.compress(as_lines.read_bytes()))
    assert list(read_records(as_list)) == [(Location(str(as_list), 2, 1), {"a": "你好"})]
    assert list(read_records(str(as_lines))) == [(Location(str(as_lines), 1), {"a": "你好"})]
    assert list(read_records(packed)) == [(Location(str(packed), 1), {"a": "你好"})]
    pq.write_table(pa.table({"a": ["你好"]}), tmp_path / "table.json")
    assert values(tmp_path / "table.json") == [{"a": "你好"}]


@pytest.mark.parametrize("name", ["a.json.gz", "a.parquet"])
def test_a_name_that_the_content_does_not_bear_out(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, '{"a": 1}\n')
    assert fault(path) == (
        f"{path}: its name ends in {path.suffix}, but that is not what it holds. Download or write the file again, "
        "or name it after what it holds"
    )


def test_what_json_lets_through(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", r'["\ud800", NaN, -Infinity, 1e999, "a\u0000b", {"": {"": 1}}, null]')
    surrogate, nan, *others = values(path)
    assert surrogate == "\ud800"
    assert nan != nan
    assert others == [float("-inf"), float("inf"), "a\0b", {"": {"": 1}}, None]


# Faults behind which nothing can be read


@pytest.mark.parametrize(
    ("content", "place", "message"),
    [
        (b"", "", "the file holds no conversations" + FORMAT),
        (b" \n\n", "", "the file holds no conversations" + FORMAT),
        (b"\xef\xbb\xbf", "", "the file holds no conversations" + FORMAT),
        (b" [ ]", "", "the file holds no conversations" + FORMAT),
        (gzip.compress(b"", mtime=0), "", "the file holds no conversations" + FORMAT),
        (b"[", ":1:2", BROKEN + "Expecting value" + FORMAT),
        (b'[{"a": 1},\n {"a": 2 "b"}]', ":2:10", BROKEN + "Expecting ',' delimiter" + FORMAT),
        (b'[{"a": 1}\n {"a": 2}]', ":2:2", BROKEN + "expecting ',' or ']' after a record" + FORMAT),
        (b'[{"a": 1}, ', ":1:12", BROKEN + "Expecting value" + FORMAT),
        (b'[{"a": 1}, \n]', ":2:1", BROKEN + "Expecting value" + FORMAT),
        (b"[,1]", ":1:2", BROKEN + "Expecting value" + FORMAT),
        (b'[{"a": 1}', ":1:10", BROKEN + "expecting ',' or ']' after a record" + FORMAT),
        (b'[{"a": "b', ":1:8", BROKEN + "Unterminated string starting at" + FORMAT),
        (b'[{"a": 1}]\n[]', ":2:1", BROKEN + "more text after the end of the list" + FORMAT),
        ('["é",\r\n "é" 2]'.encode(), ":2:6", BROKEN + "expecting ',' or ']' after a record" + FORMAT),
        (b'["a\0b"]', ":1:4", BROKEN + "Invalid control character at" + FORMAT),
        (b"[\n" + b"9" * 5000 + b"]", ":2:1", BROKEN + "Exceeds the limit"),
        (b"[\n" + b"[" * 100_000, ":2:1", BROKEN + "maximum recursion depth exceeded"),
        (b'\xef\xbb\xbf[\n"\xc3(', ":2", "not UTF-8: byte 0xc3 at offset 6. Save the file as UTF-8"),
        ('["é"]'.encode()[:3], ":1", "not UTF-8: byte 0xc3 at offset 2. Save the file as UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "", "the file is UTF-16, not UTF-8. Save the file as UTF-8"),
        ("\ufeff[1]".encode("utf-16-be"), "", "the file is UTF-16, not UTF-8. Save the file as UTF-8"),
        ("[1]".encode("utf-32"), "", "the file is UTF-32, not UTF-8. Save the file as UTF-8"),
    ],
)
def test_faults_of_whole_files(tmp_path: Path, content: bytes, place: str, message: str) -> None:
    path = write(tmp_path / "chats.json", content)
    assert fault(path).startswith(f"{path}{place}: {message}")


def test_what_stands_before_a_fault_of_a_list_is_read(tmp_path: Path) -> None:
    for rest in (b'{"b" 3}]', b'"\xff"]', b'"' + b"x" * 99):
        path = write(tmp_path / "a.json", b'[{"a": 1}, "' + b"x" * 99 + b'",\n' + b" " * 99 + rest)
        records = read_records(path)
        assert [next(records)[1], next(records)[1]] == [{"a": 1}, "x" * 99]
        with pytest.raises(DataError, match=r"a\.json:2"):
            next(records)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert fault(tmp_path / "nowhere.json") == f"{tmp_path}/nowhere.json: no such file. Check the path"
    assert fault(tmp_path) == (
        f"{tmp_path}: is a folder. Name a file: .json, .jsonl, .ndjson, .json.gz, .jsonl.gz, .ndjson.gz, .parquet"
    )
    below_a_file = write(tmp_path / "a.json", "[1]") / "b.json"
    assert fault(below_a_file) == f"{below_a_file}: cannot be read (Not a directory)"


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="only Linux has it")
def test_a_file_that_breaks_off_while_it_is_read() -> None:
    assert fault(Path("/proc/self/mem")) == "/proc/self/mem: cannot be read (Input/output error)"


# Faults of single records


def test_the_lines_behind_a_broken_one_are_read(tmp_path: Path) -> None:
    lines = [
        b'{"a": 1',
        b"  {'a': 1}",
        b'\t{"a": 1}{"a": 2}',
        b'{"a": "\xff"}',
        b'{"a": "x\0"}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": ' + b"[" * 100_000,
        rb'{"a": 1, "b": {"\u001b[31m": 2, "c": 3, "\u001b[31m": 2}}',
        b'{"a": 2}',
    ]
    path = write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + b"\r\n".join(lines))
    records = as_text(read_records(path))
    assert [place for place, _ in records] == [f"{path}:{number}" for number in range(1, 10)]
    got = [value for _, value in records]
    assert got[:5] == [
        f"{path}:1:8: {BROKEN}Expecting ',' delimiter{FORMAT}",
        f"{path}:2:4: {BROKEN}Expecting property name enclosed in double quotes{FORMAT}",
        f"{path}:3:10: {BROKEN}more than one JSON value on the line{FORMAT}",
        f"{path}:4: not UTF-8: byte 0xff at offset 50. Save the file as UTF-8",
        f"{path}:5:9: {BROKEN}Invalid control character at{FORMAT}",
    ]
    assert path.read_bytes()[50] == 0xFF
    assert str(got[5]).startswith(f"{path}:6:1: {BROKEN}Exceeds the limit")
    assert str(got[6]).startswith(f"{path}:7:1: {BROKEN}maximum recursion depth exceeded")
    assert got[7:] == [
        f"{path}:8: an object has the key '\\x1b[31m' more than once. Keep one of them",
        {"a": 2},
    ]


def test_a_key_that_is_there_twice_spoils_its_record_alone(tmp_path: Path) -> None:
    key = "k" * 99
    path = write(tmp_path / "a.json", f'[{{"{key}": 1, "{key}": 1}},\n1, {{"a": [{{"b": 1, "b": 2}}]}}, {{"b": 3}}]')
    assert as_text(read_records(path)) == [
        (
            f"{path}:1 (record 1)",
            f"{path}:1 (record 1): an object has the key '{'k' * 56}... more than once. Keep one of them",
        ),
        (f"{path}:2 (record 2)", 1),
        (f"{path}:2 (record 3)", f"{path}:2 (record 3): an object has the key 'b' more than once. Keep one of them"),
        (f"{path}:2 (record 4)", {"b": 3}),
    ]


# Where chunks end

TRICKY = [
    '["你好🙂é", "\\ud83d\\ude42\\u00e9\\\\\\"", -12.5e-10, 1E+5, 0, -0, 1.25, true, null, NaN, Infinity, -Infinity]',
    ' \r\n [ 1 ,\n\t2\r\n,{ } ,[ ] ,"" ,{"a" : [ 1 , {"b":"}],{["} ] } \n] \n ',
    "[" + "9" * 4000 + ", " + "9" * 9000 + ".5, 1" + "0" * 5000 + "e3, 7]",
    '{"a": "你好"}\n\n {"b": [1.5, "\\u00e9 é"]} \r\n12\n"🙂"\n[1, 2]',
    '{"a": 1}{"b": 2}\n{"é": é}\n{"a": 2, "a": 3}\n nul\n-\n{"a": "\\ud83d"}',
]


@pytest.mark.parametrize("text", TRICKY)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
def test_no_border_between_chunks_shows(text: str, mark: bytes) -> None:
    data = mark + text.encode()
    expected = as_text(json_records(iter([data]), "a"))
    if text.lstrip().startswith("["):
        assert repr([value for _, value in expected]) == repr(json.loads(text))
    for size in [*range(1, 65), 4000, 4096]:
        assert repr(as_text(json_records(pieces(data, size), "a"))) == repr(expected), size


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("text", [TRICKY[0], TRICKY[1]])
def test_a_list_that_is_cut_anywhere_is_a_fault(text: str, size: int) -> None:
    data = text.strip().encode()
    expected = repr(as_text(json_records(iter([data]), "a")))[:-1]
    for end in range(1, len(data)):
        records = []
        with pytest.raises(DataError, match=r"^a:\d+"):
            for record in json_records(pieces(data[:end], size), "a"):
                records.append(record)
        # A number may have lost its last digits before the end shows.
        assert expected.startswith(repr(as_text(records[:-1]))[:-1]), end


def faults_of(data: bytes, size: int) -> tuple[list[tuple[str, object]], str]:
    records: list[tuple[Location, object]] = []
    try:
        for record in json_records(pieces(data, size), "a"):
            records.append(record)
    except DataError as error:
        return as_text(records), str(error)
    return as_text(records), ""


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(JSON, min_size=1, max_size=5), st.sampled_from([None, 0, 3]), st.booleans(), st.integers(1, 40))
def test_any_list_is_what_json_makes_of_it(
    items: list[object], indent: int | None, ascii_only: bool, size: int
) -> None:
    text = json.dumps(items, indent=indent, ensure_ascii=ascii_only)
    data = text.encode("utf-8", "surrogatepass" if ascii_only else "replace")
    items = json.loads(data)
    assert [value for _, value in json_records(pieces(data, size), "a")] == items
    lines = "\n".join(json.dumps(item) for item in ["no list", *items]).encode()
    assert [value for _, value in json_records(pieces(lines, size), "a")] == ["no list", *items]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.sampled_from(TRICKY), st.data())
def test_a_fault_is_the_same_whatever_the_chunks(text: str, data: st.DataObject) -> None:
    content = bytearray(text.encode())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at : at + data.draw(st.integers(0, 2))] = data.draw(
        st.sampled_from([b"", b'"', b"]", b",", b"\xff", b"\n"])
    )
    expected = faults_of(bytes(content), len(content) or 1)
    records, message = faults_of(bytes(content), data.draw(st.integers(1, 40)))
    assert message == expected[1]
    assert repr(records) == repr(expected[0])


# Floods


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(json_stream, "MAX_RECORD_BYTES", 1024)
    return 1024


@pytest.mark.parametrize("size", [1, 100, 1 << 18])
def test_a_record_may_take_its_limit_and_no_more(small_limit: int, size: int) -> None:
    for letter in ("a", "é"):
        fits, too_long = (
            json.dumps(letter * (count // len(letter.encode())), ensure_ascii=False) for count in (1022, 1024)
        )
        assert len(fits.encode()) == small_limit
        for template, place in (
            ('{}\n{{"b": 1}}', "a:1"),
            ('{{"b": 1}}\n{}', "a:2"),
            ("[1,\n{},\n2]", "a:2"),
            ("[{}]", "a:1"),
        ):
            read = list(json_records(pieces(template.format(fits).encode(), size), "a"))
            assert fits[1:-1] in [value for _, value in read]
            with pytest.raises(
                DataError, match=rf"^{place}: one record, .* takes more than 0\.000976562 MiB of text\. Look"
            ):
                list(json_records(pieces(template.format(too_long).encode(), size), "a"))


@pytest.mark.parametrize("size", [1, 100, 1 << 18])
def test_blank_space_has_the_same_limit(small_limit: int, size: int) -> None:
    for space in (" ", "\n", " \r\n"):
        fits, flood = (space * (count // len(space)) for count in (small_limit - 3, small_limit + 3))
        for template in ("1\n{}2", "[1{},2]", "[1,{}2]", "[1,2{}]", "[1,2]{}"):
            assert [value for _, value in json_records(pieces(template.format(fits).encode(), size), "a")] == [1, 2]
            with pytest.raises(DataError, match=r"^a:\d+: one record, or the blank space before it, takes more than"):
                list(json_records(pieces(template.format(flood).encode(), size), "a"))


READ = """
import sys, time, tracemalloc
from data_utils.files import read_records
from errors import DataError
for path in sys.argv[1:]:
    tracemalloc.start()
    start = time.process_time()
    try:
        for place, value in read_records(path):
            pass
    except DataError as error:
        print(tracemalloc.get_traced_memory()[1] >> 20, time.process_time() - start, error, sep="\\t")
    tracemalloc.stop()
"""


def test_a_bomb_ends_in_a_fault_with_bounded_memory(tmp_path: Path) -> None:
    paths = []
    starts = [("", " "), ("[1,", " "), ("1000", "\n"), ("", "["), ('["', "a"), ('{"a', "a")]
    for number, (start, letter) in enumerate(starts):
        # 300 MB of one character behind the start, in members of 30 MB.
        members = gzip.compress(letter.encode() * 30_000_000, 1) * 10
        paths.append(write(tmp_path / f"{number}.json.gz", gzip.compress(start.encode()) + members))
        assert paths[-1].stat().st_size < 2_000_000
    lines = run_well("-c", READ, *paths).stdout.splitlines()
    messages = []
    for line in lines:
        megabytes, seconds, message = line.split("\t")
        assert int(megabytes) < 4 * 32, message
        assert float(seconds) < 15, message  # of a processor; without a limit each would take minutes
        messages.append(re.split(r": |\. ", message)[1])
    limit = "one record, or the blank space before it, takes more than {} MiB of text"
    assert messages == [limit.format(1), *[limit.format(32)] * 2, "not valid JSON", *[limit.format(32)] * 2]


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
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
    # The first round fills caches.
    for name, (_, small, large) in peaks.items():
        assert large - small < 1_000_000, (name, small, large)


def test_a_long_record_is_not_tried_over_and_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    decode: Callable[[str, int], tuple[object, int]] = json_stream._decode

    def counting(text: str, position: int) -> tuple[object, int]:
        tried.append(len(text) - position)
        return decode(text, position)

    monkeypatch.setattr(json_stream, "_decode", counting)
    record = {"a": ["x" * 100] * 50_000, "b": "y" * 5_000_000}
    assert values(write(tmp_path / "a.json", json.dumps([1, record, 2]))) == [1, record, 2]
    assert len(tried) < 12
    assert sum(tried) < 50_000_000


# gzip


def test_broken_gzip_files(tmp_path: Path) -> None:
    packed = gzip.compress(b"".join(b'{"a": %d}\n' % number for number in range(50_000)))
    bad_sum = bytearray(packed)
    bad_sum[-6] ^= 1
    middle = bytearray(packed)
    middle[len(packed) // 2 : len(packed) // 2 + 50] = bytes(50)
    for content, what in (
        (packed[:-9], "it ends in the middle"),
        (packed[: len(packed) // 2], "it ends in the middle"),
        (packed[:5], "it ends in the middle"),
        (bytes(bad_sum), "Error -3 while decompressing data: incorrect data check"),
        (packed + b"not gzip", "Error -3 while decompressing data: incorrect header check"),
        (packed + packed[:100], "it ends in the middle"),
        (b"\x1f\x8b\x01" + packed[3:], "Error -3 while decompressing data: unknown compression method"),
    ):
        path = write(tmp_path / "a.jsonl.gz", content)
        assert fault(path) == f"{path}: the gzip file is broken ({what}). Download or pack it again"
    path = write(tmp_path / "a.jsonl.gz", bytes(middle))
    assert fault(path).startswith(f"{path}: the gzip file is broken (Error -3 while decompressing data: ")


def test_all_whole_records_before_the_end_of_a_cut_gzip_file_are_read(tmp_path: Path) -> None:
    packer = zlib.compressobj(wbits=31)
    packed = packer.compress(b'{"a": 1}\n{"a": 2}\n{"a"') + packer.flush(zlib.Z_FULL_FLUSH)
    records = read_records(write(tmp_path / "a.jsonl.gz", packed))
    assert [next(records)[1], next(records)[1]] == [{"a": 1}, {"a": 2}]
    with pytest.raises(DataError, match="it ends in the middle"):
        next(records)


# Parquet


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


def test_rows_of_several_groups_and_batches_are_counted_through(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": list(range(1500))}), path, row_group_size=700)
    assert list(read_records(path)) == [(Location(str(path), record=n + 1), {"n": n}) for n in range(1500)]


def test_parquet_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"

    def fault_of(table: pa.Table, **options: Any) -> str:
        pq.write_table(table, path, **options)
        return fault(path).removeprefix(str(path))

    twice = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["\x1b[31m", "\x1b[31m"])
    assert fault_of(twice) == ": two columns have the name '\\x1b[31m'. Rename one of them"
    inner = pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    assert fault_of(pa.table({"s": inner})).startswith(" (record 1): the column 's' cannot be read from here on (Value")
    assert fault_of(pa.table({"a": pa.array([], pa.string())})) == ": the file holds no conversations" + FORMAT
    keys = pa.array([[("a", 1), ("a", 2)]], pa.map_(pa.string(), pa.int8()))
    assert fault_of(pa.table({"m": keys})) == (
        " (record 1): the column 'm' cannot be read from here on (ValueError: a map has a key more than once). "
        "Leave the column out, or write it as strings"
    )
    early = pa.array([0] * 300 + [-(10**17)], pa.timestamp("ms"))
    assert fault_of(pa.table({"t": early})).startswith(" (record 257): the column 't' cannot be read from here on (")
    bytes_column = pa.array([b"a", b"\xff"], pa.binary()).view(pa.string())
    assert fault_of(pa.table({"t": bytes_column})).startswith(
        " (record 1): the column 't' cannot be read from here on (U"
    )


def test_broken_parquet_files(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"t": [f"{number} text" for number in range(1500)]})
    pq.write_table(table, path, row_group_size=500, compression="none", use_dictionary=False, write_page_checksum=True)
    content = bytearray(path.read_bytes())
    content[content.index(b"1234 text")] = ord("7")
    write(path, bytes(content))
    records = read_records(path)
    read = [next(records)[1] for _ in range(768)]
    assert read == table.to_pylist()[:768]
    with pytest.raises(DataError) as error:
        list(records)
    assert str(error.value).startswith(f"{path} (record 769): the Parquet file cannot be read (")
    assert str(error.value).endswith("). Download or write it again")
    for cut in (4, 50, len(content) // 2, len(content) - 1):
        assert fault(write(path, bytes(content[:cut]))).startswith(f"{path}: the Parquet file cannot be read (")


def test_parquet_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": [1]}), path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert fault(path).startswith(f"{path}: a Parquet file needs pyarrow (")
    assert fault(path).endswith("). pip install pyarrow")


# Progress


def test_progress_adds_up_to_the_size_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        for place, value in read_records(path, steps.append):
            if value == records[500]:
                halfway = sum(steps)
            assert place.path == str(path)
        size = path.stat().st_size
        assert sum(steps) == size, path
        assert len(steps) >= 4
        assert min(steps) >= 0
        assert 0.2 * size < halfway < 0.8 * size


# Folders


def test_the_data_files_of_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "b" / ".cache").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "b", target_is_directory=True)
    names = ["b/2.jsonl", "b/10.JSON.gz", "a.ndjson", "z.parquet"]
    others = [".hidden.json", "b/.cache/x.json", "README.md", "b/\x1b.txt", "b/x.json.bak", "json", "n1", "n2"]
    for name in names + others:
        write(tmp_path / name, "[1]")
    (tmp_path / "b" / "linked.json").symlink_to(tmp_path / "a.ndjson")
    with caplog.at_level(logging.INFO):
        found = data_files(str(tmp_path))
    assert found == [
        tmp_path / name for name in ("a.ndjson", "b/10.JSON.gz", "b/2.jsonl", "b/linked.json", "z.parquet")
    ]
    assert caplog.messages == [
        f"{tmp_path}: ignored 7 that are not data files: "
        "'README.md', 'b/\\x1b.txt', 'b/x.json.bak', 'json', 'link', ..."
    ]


def test_a_file_is_its_own_data_file_whatever_its_name(tmp_path: Path) -> None:
    path = write(tmp_path / ".notes", "x")
    assert data_files(path) == [path]


def test_a_folder_without_data_files(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "[1]")
    with pytest.raises(DataError) as error:
        data_files(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: the folder has no data files. They end in .json, .jsonl, .ndjson, .json.gz, .jsonl.gz, "
        ".ndjson.gz, .parquet"
    )
    with pytest.raises(DataError, match=r"/nowhere: no such file\. Check the path$"):
        data_files(tmp_path / "nowhere")


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 300)
    with pytest.raises(DataError, match=r"x: cannot be read \(File name too long\)$"):
        data_files(long)
    assert fault(long) == f"{long}: cannot be read (File name too long)"


def test_bytes_that_are_not_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", re.sub(rb"[\x1f{\[]", b"", os.urandom(4096)))
    for place, value in read_records(path):
        assert isinstance(value, (DataError, int)), place
