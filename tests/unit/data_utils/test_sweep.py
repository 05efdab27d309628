"""Every format, in every kind of file, with a record that is wrong: one line with its place, wherever it is read."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chat.families import QWEN_V1
from data_utils.encode import EncodeOptions, Encoder
from errors import DataError
from qwen_model.tokenization_qwen import QWenTokenizer
from scripts.convert_data import parse_files
from tests.data import reader
from tests.records import ANSWER, ASK, EVERY_FORMAT, HELLO, HI

DEEP = "[" * 100_000
LESS_DEEP = "[" * 500 + "]" * 500

BAD: dict[str, list[dict[str, Any]]] = {
    "conversations": [
        {"conversations": [HI, {**HELLO, "value": None}]},
        {"conversations": [HI, {**HELLO, "from": "Assistant"}]},
        {"conversations": [HI, {"from": "function_call", "value": DEEP}]},
        {"conversations": [HI, {"from": "function_call", "value": f'{{"name": "f", "arguments": {LESS_DEEP}}}'}]},
        {"conversations": [HI, {"from": "function_call", "value": '{"name": "f", "arguments": "x"}'}]},
        {"conversations": [HI, HELLO], "tools": DEEP},
        {"conversations": [HI, HELLO], "tools": LESS_DEEP},
        {"conversations": [HI]},
    ],
    "messages": [
        {"messages": [ASK, {**ANSWER, "content": 3}]},
        {"messages": [ASK, {**ANSWER, "role": "\x1b[31m\n"}]},
        {"messages": [ASK, {**ANSWER, "tool_calls": [{"function": {"name": "f", "arguments": DEEP}}]}]},
        {"messages": [ASK, {**ANSWER, "tool_calls": [{"function": {"name": "f", "arguments": LESS_DEEP}}]}]},
        {"messages": [ASK, {**ANSWER, "tool_calls": [{"function": {"name": "f", "arguments": "{'a': 1}"}}]}]},
        {"messages": [ASK, {"role": "assistant", "content": [{"type": "tool_call", "value": DEEP}]}]},
        {"messages": [ASK, ANSWER], "tools": [{"name": "f", "parameters": DEEP}]},
        {"messages": [ASK, ANSWER], "tools": [{"name": "f", "parameters": "{}", "inputSchema": "[]"}]},
        {"messages": [ASK, {**ANSWER, "loss_weight": -1}]},
    ],
    "alpaca": [
        {"instruction": "Hi", "output": 3},
        {"instruction": "Hi", "output": "Hello!", "history": [["a"]]},
        {"instruction": "Hi", "output": "Hello!", "tools": "[{}]"},
        {"instruction": "Hi", "output": "Hello!", "system_prompt": ["a"]},
        {"instruction": "Hi", "output": "Hello!", "weight": 2},
    ],
    "pairs": [
        {"prompt": 3, "response": "Hello!"},
        {"prompt": "Hi", "response": ["Hello!"]},
        {"prompt": "Hi", "response": "Hello!", "chosen": "x"},
        {"prompt": "Hi", "response": "Hello!", "question": "a", "answer": "b"},
    ],
}


def _nested(value: Any, make: Callable[[Any], Any] = lambda inner: [inner]) -> Any:
    for _ in range(600):
        value = make(value)
    return value


# Content of a file of records, and the place of the third, in which {} is the line that its text starts in.
FILES: dict[str, tuple[Callable[[Sequence[Any]], bytes], str]] = {
    "lines.jsonl": (lambda records: "\n".join(map(json.dumps, records)).encode(), ":3"),
    "list.json": (lambda records: json.dumps(records).encode(), ":1 (record 3)"),
    "indented.json": (lambda records: json.dumps(records, indent=1).encode(), ":{} (record 3)"),
    "objects.jsonl": (lambda records: "\n".join(json.dumps(r, indent=1) for r in records).encode(), ":{} (record 3)"),
    "wrapped.json": (lambda records: json.dumps({"data": records}, indent=1).encode(), ":{} (record 3)"),
    "lines.jsonl.gz": (lambda records: gzip.compress("\n".join(map(json.dumps, records)).encode()), ":3"),
}


@pytest.fixture(scope="module")
def encoder(golden_small: Path) -> Encoder:
    return Encoder(QWenTokenizer.from_pretrained(golden_small / "tiny-qwen-small"), QWEN_V1, EncodeOptions())


def faults_of(encoder: Encoder, path: Path) -> list[str]:
    """Return the fault that a run names, and that of a conversion unless it accepts the record."""
    with pytest.raises(DataError) as error:
        for _ in reader(encoder, path).read():
            pass
    faults: list[DataError] = []
    kept = list(parse_files([path], "auto", lambda count: None, faults))
    assert len(kept) + len(faults) == 4
    return [str(error.value), *map(str, faults)]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("name", BAD)
def test_bad_record_is_named_by_its_place(name: str, file: str, encoder: Encoder, tmp_path: Path) -> None:
    content, place = FILES[file]
    good = EVERY_FORMAT[name]
    deep = [{**good, "tools": _nested(1)}, {**good, "tools": _nested(1, lambda inner: {"a": inner})}]
    for bad in [*BAD[name], *deep]:
        path = tmp_path / file
        path.write_bytes(content([good, good, bad, good]))
        expected = re.escape(f"{path}{place}: ").replace(r"\{\}", r"\d+")
        for fault in faults_of(encoder, path):
            assert re.match(expected, fault) and fault.isprintable() and len(fault) < 1000, fault


@pytest.mark.parametrize("name", BAD)
def test_bad_row_of_a_table_is_named_by_its_number(name: str, encoder: Encoder, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for bad in BAD[name]:
        good = EVERY_FORMAT[name]
        rows = [good, good, bad, good]
        try:
            table = pa.table({name: [row.get(name) for row in rows] for name in {**good, **bad}})
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            continue  # a table has no columns of mixed types
        pq.write_table(table, path)
        for fault in faults_of(encoder, path):
            assert fault.startswith(f"{path} (record 3): ") and fault.isprintable() and len(fault) < 1000, fault


@pytest.mark.parametrize("opening", ["[", '{"a":', '[{"":'])
@pytest.mark.parametrize("name", BAD)
def test_record_of_100000_levels_is_a_fault(name: str, opening: str, encoder: Encoder, tmp_path: Path) -> None:
    good = json.dumps(EVERY_FORMAT[name])
    deep = f'{good[:-1]}, "note": {opening * 100_000}'
    path = tmp_path / "a.jsonl"
    path.write_text(f"{good}\n{good}\n{deep}\n{good}\n")
    for fault in faults_of(encoder, path):
        assert fault.startswith(f"{path}:3:1: not valid JSON: ")
    for text in (
        f"[{good}, {deep}]",
        f'{{"data": [{good}, {deep}]}}',
        f"{json.dumps(EVERY_FORMAT[name], indent=1)}\n{deep}",
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=rf"^{re.escape(str(path))}:\d+:\d+: not valid JSON: "):
            for _ in reader(encoder, path).read():
                pass


def test_file_of_one_deep_value_is_a_fault(encoder: Encoder, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for opening in ("[", '{"a":', '{"data": [', '{\n"a":', '{"messages": [{"role":'):
        path.write_text(opening * 100_000)
        with pytest.raises(DataError) as error:
            for _ in reader(encoder, path).read():
                pass
        assert str(error.value).startswith(f"{path}:1") and len(str(error.value)) < 500, opening
