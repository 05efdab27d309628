"""Records of streamed JSON: locations, faults, borders between chunks, and limits."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_utils import json_stream
from data_utils.files import Location, read_records
from data_utils.json_stream import json_records
from errors import DataError
from tests.commands import run_well
from tests.data_files import FORMAT, as_text, fault, pieces, values, write

BROKEN = "not valid JSON: "


def test_list_records_have_line_and_number(tmp_path: Path) -> None:
    record = {"id": "a", "conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello!"}]}
    path = write(tmp_path / "chats.json", json.dumps([record, 2, {"a": ["b", {}]}], indent=1))
    assert list(read_records(path)) == [
        (Location(str(path), 2, 1), record),
        (Location(str(path), 15, 2), 2),
        (Location(str(path), 16, 3), {"a": ["b", {}]}),
    ]


def test_line_records_have_their_line_and_blank_lines_are_skipped(tmp_path: Path) -> None:
    path = write(tmp_path / "chats.jsonl", '\n{"a": "\u2028\u0085 line"}\r\n   \n\t{"b": 2} \n"c"\n4')
    assert list(read_records(path)) == [
        (Location(str(path), 2), {"a": "\u2028\u0085 line"}),
        (Location(str(path), 4), {"b": 2}),
        (Location(str(path), 5), "c"),
        (Location(str(path), 6), 4),
    ]


def test_values_that_python_accepts_beyond_json(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", r'["\ud800", NaN, -Infinity, 1e999, "a\u0000b", {"": {"": 1}}, null]')
    surrogate, nan, *others = values(path)
    assert surrogate == "\ud800"
    assert nan != nan
    assert others == [float("-inf"), float("inf"), "a\0b", {"": {"": 1}}, None]


@pytest.mark.parametrize(
    ("content", "location", "message"),
    [
        (b"", "", "the file contains no conversations" + FORMAT),
        (b" \n\n", "", "the file contains no conversations" + FORMAT),
        (b"\xef\xbb\xbf", "", "the file contains no conversations" + FORMAT),
        (b" [ ]", "", "the file contains no conversations" + FORMAT),
        (gzip.compress(b"", mtime=0), "", "the file contains no conversations" + FORMAT),
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
def test_faults_that_end_the_reading(tmp_path: Path, content: bytes, location: str, message: str) -> None:
    path = write(tmp_path / "chats.json", content)
    assert fault(path).startswith(f"{path}{location}: {message}")


def test_records_before_a_fault_of_a_list_are_read(tmp_path: Path) -> None:
    for rest in (b'{"b" 3}]', b'"\xff"]', b'"' + b"x" * 99):
        path = write(tmp_path / "a.json", b'[{"a": 1}, "' + b"x" * 99 + b'",\n' + b" " * 99 + rest)
        records = read_records(path)
        assert [next(records)[1], next(records)[1]] == [{"a": 1}, "x" * 99]
        with pytest.raises(DataError, match=r"a\.json:2"):
            next(records)


def test_lines_after_a_broken_line_are_read(tmp_path: Path) -> None:
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
    assert [location for location, _ in records] == [f"{path}:{number}" for number in range(1, 10)]
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


def test_repeated_key_affects_only_its_record(tmp_path: Path) -> None:
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


CHUNKED_TEXTS = [
    '["你好🙂é", "\\ud83d\\ude42\\u00e9\\\\\\"", -12.5e-10, 1E+5, 0, -0, 1.25, true, null, NaN, Infinity, -Infinity]',
    ' \r\n [ 1 ,\n\t2\r\n,{ } ,[ ] ,"" ,{"a" : [ 1 , {"b":"}],{["} ] } \n] \n ',
    "[" + "9" * 4000 + ", " + "9" * 9000 + ".5, 1" + "0" * 5000 + "e3, 7]",
    '{"a": "你好"}\n\n {"b": [1.5, "\\u00e9 é"]} \r\n12\n"🙂"\n[1, 2]',
    '{"a": 1}{"b": 2}\n{"é": é}\n{"a": 2, "a": 3}\n nul\n-\n{"a": "\\ud83d"}',
]


@pytest.mark.parametrize("text", CHUNKED_TEXTS)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
def test_chunk_size_does_not_change_records(text: str, mark: bytes) -> None:
    data = mark + text.encode()
    expected = as_text(json_records(iter([data]), "a"))
    if text.lstrip().startswith("["):
        assert repr([value for _, value in expected]) == repr(json.loads(text))
    for size in [*range(1, 65), 4000, 4096]:
        assert repr(as_text(json_records(pieces(data, size), "a"))) == repr(expected), size


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("text", [CHUNKED_TEXTS[0], CHUNKED_TEXTS[1]])
def test_truncated_list_is_a_fault(text: str, size: int) -> None:
    data = text.strip().encode()
    expected = repr(as_text(json_records(iter([data]), "a")))[:-1]
    for end in range(1, len(data)):
        records = []
        with pytest.raises(DataError, match=r"^a:\d+"):
            for record in json_records(pieces(data[:end], size), "a"):
                records.append(record)
        # The last record may be a number without its last digits, so it is not compared.
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
def test_any_list_equals_json_loads(items: list[object], indent: int | None, ascii_only: bool, size: int) -> None:
    text = json.dumps(items, indent=indent, ensure_ascii=ascii_only)
    data = text.encode("utf-8", "surrogatepass" if ascii_only else "replace")
    items = json.loads(data)
    assert [value for _, value in json_records(pieces(data, size), "a")] == items
    lines = "\n".join(json.dumps(item) for item in ["no list", *items]).encode()
    assert [value for _, value in json_records(pieces(lines, size), "a")] == ["no list", *items]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.sampled_from(CHUNKED_TEXTS), st.data())
def test_chunk_size_does_not_change_faults(text: str, data: st.DataObject) -> None:
    content = bytearray(text.encode())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at : at + data.draw(st.integers(0, 2))] = data.draw(
        st.sampled_from([b"", b'"', b"]", b",", b"\xff", b"\n"])
    )
    expected = faults_of(bytes(content), len(content) or 1)
    records, message = faults_of(bytes(content), data.draw(st.integers(1, 40)))
    assert message == expected[1]
    assert repr(records) == repr(expected[0])


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(json_stream, "MAX_RECORD_BYTES", 1024)
    return 1024


@pytest.mark.parametrize("size", [1, 100, 1 << 18])
def test_record_size_limit(small_limit: int, size: int) -> None:
    for letter in ("a", "é"):
        fits, too_long = (
            json.dumps(letter * (count // len(letter.encode())), ensure_ascii=False) for count in (1022, 1024)
        )
        assert len(fits.encode()) == small_limit
        for template, location in (
            ('{}\n{{"b": 1}}', "a:1"),
            ('{{"b": 1}}\n{}', "a:2"),
            ("[1,\n{},\n2]", "a:2"),
            ("[{}]", "a:1"),
        ):
            read = list(json_records(pieces(template.format(fits).encode(), size), "a"))
            assert fits[1:-1] in [value for _, value in read]
            with pytest.raises(
                DataError, match=rf"^{location}: one record, .* has more than 0\.000976562 MiB of text\. Check"
            ):
                list(json_records(pieces(template.format(too_long).encode(), size), "a"))


@pytest.mark.parametrize("size", [1, 100, 1 << 18])
def test_white_space_has_the_same_limit(small_limit: int, size: int) -> None:
    for space in (" ", "\n", " \r\n"):
        fits, flood = (space * (count // len(space)) for count in (small_limit - 3, small_limit + 3))
        for template in ("1\n{}2", "[1{},2]", "[1,{}2]", "[1,2{}]", "[1,2]{}"):
            assert [value for _, value in json_records(pieces(template.format(fits).encode(), size), "a")] == [1, 2]
            with pytest.raises(DataError, match=r"^a:\d+: one record, or the white space before it, has more than"):
                list(json_records(pieces(template.format(flood).encode(), size), "a"))


READ = """
import sys, time, tracemalloc
from data_utils.files import read_records
from errors import DataError
for path in sys.argv[1:]:
    tracemalloc.start()
    start = time.process_time()
    try:
        for location, value in read_records(path):
            pass
    except DataError as error:
        print(tracemalloc.get_traced_memory()[1] >> 20, time.process_time() - start, error, sep="\\t")
    tracemalloc.stop()
"""


def test_decompression_bomb_is_a_fault_with_bounded_memory(tmp_path: Path) -> None:
    paths = []
    starts = [("", " "), ("[1,", " "), ("1000", "\n"), ("", "["), ('["', "a"), ('{"a', "a")]
    for number, (start, letter) in enumerate(starts):
        # 300 MB of one character after the start, in members of 30 MB.
        members = gzip.compress(letter.encode() * 30_000_000, 1) * 10
        paths.append(write(tmp_path / f"{number}.json.gz", gzip.compress(start.encode()) + members))
        assert paths[-1].stat().st_size < 2_000_000
    lines = run_well("-c", READ, *paths, is_new=True).stdout.splitlines()
    messages = []
    for line in lines:
        megabytes, seconds, message = line.split("\t")
        assert int(megabytes) < 4 * 32, message
        assert float(seconds) < 15, message  # CPU time; without a limit each would take minutes
        messages.append(re.split(r": |\. ", message)[1])
    limit = "one record, or the white space before it, has more than {} MiB of text"
    assert messages == [limit.format(1), *[limit.format(32)] * 2, "not valid JSON", *[limit.format(32)] * 2]


def test_long_record_is_parsed_only_a_few_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
