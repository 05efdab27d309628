"""Prompts of every format, with and without answers, and of texts with one a line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_utils.prompts import Prompts, prompt_key, prompt_record
from data_utils.schema import Conversation
from errors import ConfigError, DataError

USER = {"role": "user", "content": "Q"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]}
RESULT = {"role": "tool", "content": "R", "tool_call_id": "1"}


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def shown(conversation: Conversation) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in conversation.turns]


@pytest.mark.parametrize(
    "question",
    [
        {"prompt": "Q"},
        {"question": "Q"},
        {"query": "Q"},
        {"instruction": "Q"},
        {"instruction": "Q", "text": "rendered: Q"},
        {"prompt": "Q", "text": "of another kind"},
        {"prompt": [USER]},
        {"messages": [USER]},
        {"conversations": [{"from": "human", "value": "Q"}]},
        {"prompt": "Q", "id": 5, "category": "x"},
    ],
    ids=str,
)
def test_question_alone_is_a_prompt(tmp_path: Path, question: dict[str, Any]) -> None:
    [prompt] = Prompts(write(tmp_path / "q.jsonl", question))
    assert shown(prompt) == [("user", "Q")]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"instruction": "Q", "input": "I"}, [("user", "Q\nI")]),
        ({"prompt": "Q", "response": "A"}, [("user", "Q")]),
        ({"prompt": "Q", "response": None}, [("user", "Q")]),
        ({"question": "Q", "response": "A"}, [("user", "Q")]),
        ({"query": "Q", "history": [["a", "b"]], "system": "S"}, [("system", "S"), ("user", "a"), ("assistant", "b"),
                                                                   ("user", "Q")]),
        ({"messages": [USER, CALL, RESULT]}, [("user", "Q"), ("assistant", ""), ("tool", "R")]),
        ({"messages": [USER, CALL]}, [("user", "Q")]),
        ({"text": "Once"}, [("text", "Once")]),
    ],
    ids=str,
)  # fmt: skip
def test_prompt_ends_before_the_answer(tmp_path: Path, record: Any, expected: list[tuple[str, str]]) -> None:
    [prompt] = Prompts(write(tmp_path / "q.jsonl", record))
    assert shown(prompt) == expected


def test_records_with_and_without_answers_are_one_file(tmp_path: Path) -> None:
    data = write(tmp_path / "q.jsonl", {"prompt": "Q"}, {"prompt": "Q", "response": "A"}, {"prompt": "Q"})
    assert len(Prompts(data).keys) == len(Prompts(data, "pairs").keys) == 3
    assert len(set(Prompts(data).keys)) == 1


def test_rows_of_a_table_are_prompts(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"question": ["Q", "R"], "answer": pa.array([None, "A"], pa.string())}), tmp_path / "q.parquet"
    )
    assert [shown(prompt) for prompt in Prompts(tmp_path / "q.parquet")] == [[("user", "Q")], [("user", "R")]]


@pytest.mark.parametrize("name", ["q.txt", "q.txt.gz"])
def test_line_of_a_text_is_a_prompt(tmp_path: Path, name: str) -> None:
    """Only its end is cut: white space in it is the user's."""
    text = "\ufeff  indented \n\n \t\n\u3000日\u2028x\r\n\tlast".encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    prompts = list(Prompts(tmp_path / name))
    assert [shown(prompt) for prompt in prompts] == [
        [("user", "  indented ")], [("user", "\u3000日\u2028x")], [("user", "\tlast")],
    ]  # fmt: skip
    assert [str(prompt.where) for prompt in prompts] == [f"{tmp_path / name}:{line}" for line in (1, 4, 5)]


def test_text_that_is_json_is_read_as_records_unless_it_is_said_to_be_text(tmp_path: Path) -> None:
    data = write(tmp_path / "q.txt", {"prompt": "Q"})
    assert [shown(prompt) for prompt in Prompts(data)] == [[("user", "Q")]]
    assert [shown(prompt) for prompt in Prompts(data, "text")] == [[("user", '{"prompt": "Q"}')]]


def test_long_prompt_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("x" * 3_000_000 + "\ny\n")
    assert [len(prompt.turns[0].content) for prompt in Prompts(tmp_path / "q.txt")] == [3_000_000, 1]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "contains no prompt"),
        (b"\n \n", "contains no prompt"),
        (b"ok\n\xff\n", r"q\.txt:2: is not UTF-8 \(byte 0xff\)"),
        ("Hi\n".encode("utf-16"), "the file is UTF-16"),
        (b"a\0b\n", r"q\.txt:1: contains a zero byte"),
        (b"a\0b\n\0\n", "2 faults, nothing is answered"),
    ],
)
def test_faulty_text_is_refused(tmp_path: Path, content: bytes, match: str) -> None:
    (tmp_path / "q.txt").write_bytes(content)
    with pytest.raises(DataError, match=match):
        Prompts(tmp_path / "q.txt")


@pytest.mark.parametrize(
    ("record", "match"),
    [
        ({"answer": "A"}, "no known format"),
        ({"prompt": 5}, '"prompt" must be a string'),
        ({"prompt": "Q", "question": "Q"}, "several pairs"),
        ({"messages": [{"role": "assistant", "content": "A"}]}, "nothing to answer"),
        ({"messages": [USER], "text": "x"}, "--data_format"),
        ({"prompt": "Q", "images": ["a.png"]}, "only text"),
    ],
)
def test_record_without_a_prompt_is_refused(tmp_path: Path, record: Any, match: str) -> None:
    with pytest.raises(DataError, match=match):
        Prompts(write(tmp_path / "q.jsonl", record))
    with pytest.raises(ConfigError, match="--data_format csv is unknown"):
        Prompts(tmp_path / "q.jsonl", "csv")


def test_files_that_change_while_they_are_read_are_refused(tmp_path: Path) -> None:
    data = write(tmp_path / "q.jsonl", {"prompt": "Q"}, {"prompt": "R"})
    prompts = Prompts(data)
    for records in ([{"prompt": "Q"}, {"prompt": "S"}], [{"prompt": "Q"}], [{"prompt": x} for x in "QRS"]):
        write(data, *records)
        with pytest.raises(DataError, match="since the start"):
            list(prompts)


def test_key_depends_on_all_of_the_prompt(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    records = [
        {"prompt": "Q"}, {"prompt": "Q "}, {"prompt": "Q", "system": "S"}, {"prompt": "Q", "history": [["a", "b"]]},
        {"prompt": "Q", "tools": tools},
    ]  # fmt: skip
    prompts = Prompts(write(tmp_path / "q.jsonl", *records))
    assert len(set(prompts.keys)) == len(records)
    read = [json.loads(json.dumps(prompt_record(prompt))) for prompt in prompts]
    assert list(prompts.keys) == [prompt_key(record) for record in read]
