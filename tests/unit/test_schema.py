"""Which files and records are conversations, and the line that says why one is not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from data_utils.schema import parse_conversation, read_records
from errors import DataError
from qwen_model.families import Turn

WHERE = "chats.jsonl:7"
HI = {"from": "user", "value": "Hi"}
HELLO = {"from": "assistant", "value": "Hello!"}
RECORD = {"id": "a", "conversations": [HI, HELLO]}


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_original_format() -> None:
    conversation = parse_conversation(RECORD, WHERE)
    assert conversation.turns == (Turn("user", "Hi"), Turn("assistant", "Hello!"))
    assert conversation.where == WHERE


def test_synonyms_system_turn_and_keys_that_mean_nothing() -> None:
    record = {
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "", "weight": 0},
            {"from": "gpt", "value": "Hello!", "loss": False, "tool_calls": [], "reasoning_content": None},
        ],
        "tools": "[]",
        "functions": [],
        "system": "",
        "source": 3,
    }
    roles = [turn.role for turn in parse_conversation(record, WHERE).turns]
    assert roles == ["system", "user", "assistant"]


def test_an_answer_may_come_first() -> None:
    assert parse_conversation({"conversations": [HELLO, HI]}, WHERE).turns[0] == Turn("assistant", "Hello!")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (["a"], "a record must be an object, not ['a']. Write {"),
        (None, "a record must be an object, not None. Write {"),
        ({}, 'the record has no "conversations", its keys are []. Write {'),
        ({"messages": [HI]}, "the record has no \"conversations\", its keys are ['messages']. Write {"),
        ({"conversations": "Hi"}, "\"conversations\" must be a list of turns, not 'Hi'. Write {"),
        ({"conversations": []}, '"conversations" is empty. Give it at least one turn, or remove the record'),
        ({"conversations": [HI, "Hello!"]}, "turn 2 must be an object, not 'Hello!'. Write {"),
        ({"conversations": [{"value": "x"}]}, "turn 1 has no \"from\", its keys are ['value']. Write {"),
        ({"conversations": [HI, {"from": "gpt"}]}, "turn 2 has no \"value\", its keys are ['from']. Write {"),
        (
            {"conversations": [{"from": "user", "value": None}]},
            'the "value" of turn 1 must be a string, not None. Write the text as a string',
        ),
        (
            {"conversations": [{"from": "user", "value": ["a" * 99]}]},
            f'the "value" of turn 1 must be a string, not [\'{"a" * 55}.... Write the text as a string',
        ),
        (
            {"conversations": [HI, {"from": "bot", "value": "x"}]},
            "turn 2 is from an unknown role, 'bot'. Known roles are user, human, assistant, gpt, system",
        ),
        (
            {"conversations": [{"from": ["user"], "value": "x"}]},
            "turn 1 is from an unknown role, ['user']. Known roles are user, human, assistant, gpt, system",
        ),
        (
            {"conversations": [HI, {"from": "function_call", "value": "x"}]},
            "turn 2 is from 'function_call': tool calls are not supported yet. Leave the record out",
        ),
        (
            {"conversations": [HI, {"from": "observation", "value": "x"}]},
            "turn 2 is from 'observation': tool calls are not supported yet. Leave the record out",
        ),
        (
            {"conversations": [HI, {"from": "system", "value": "x"}]},
            "turn 2 is from 'system'. A system message can only be the first turn",
        ),
        (
            {"conversations": [{"from": "system", "value": "Be brief."}, HI]},
            "no turn is from the assistant, so there is nothing to learn. Remove the record",
        ),
        (
            {**RECORD, "tools": '[{"name": "f"}]'},
            "'tools' in a record: tool calls are not supported yet. Leave the record out",
        ),
        (
            {"conversations": [HI, {**HELLO, "tool_calls": [{"name": "f"}]}]},
            "'tool_calls' in turn 2: tool calls are not supported yet. Leave the record out",
        ),
        (
            {"conversations": [HI, {**HELLO, "reasoning_content": "hm"}]},
            "'reasoning_content' in turn 2: thinking is not supported yet. Leave the record out",
        ),
        (
            {**RECORD, "system": "Be brief."},
            "a \"system\" field ('Be brief.') is not part of the format and would be ignored. Make it the first turn",
        ),
    ],
)
def test_faulty_records(record: object, message: str) -> None:
    with pytest.raises(DataError, match="^" + re.escape(f"{WHERE}: {message}")) as error:
        parse_conversation(record, WHERE, needs_answer=True)
    assert "\n" not in str(error.value)
    assert error.value.where == WHERE


def test_a_list_gives_each_records_line(tmp_path: Path) -> None:
    path = write(tmp_path / "chats.json", json.dumps([RECORD, 2, {"a": ["b", {}]}], indent=1))
    assert list(read_records(path)) == [
        (f"{path}:2 (record 1)", RECORD),
        (f"{path}:15 (record 2)", 2),
        (f"{path}:16 (record 3)", {"a": ["b", {}]}),
    ]


def test_lines_give_their_number_and_blank_ones_are_skipped(tmp_path: Path) -> None:
    path = write(tmp_path / "chats.jsonl", '\n{"a": "\u2028\u0085 line"}\r\n   \n\t{"b": 2} \n{"c": 3}')
    assert list(read_records(path)) == [
        (f"{path}:2", {"a": "\u2028\u0085 line"}),
        (f"{path}:4", {"b": 2}),
        (f"{path}:5", {"c": 3}),
    ]


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte order mark"])
def test_the_content_decides_not_the_name(tmp_path: Path, mark: str) -> None:
    as_list = write(tmp_path / "list.jsonl", mark + ' \n[{"a": "你好"}]\n')
    as_lines = write(tmp_path / "lines.json", mark + '{"a": "你好"}\n')
    assert list(read_records(as_list)) == [(f"{as_list}:2 (record 1)", {"a": "你好"})]
    assert list(read_records(str(as_lines))) == [(f"{as_lines}:1", {"a": "你好"})]


def test_a_lone_surrogate_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "chats.json", r'["\ud800"]')
    assert [record for _, record in read_records(path)] == ["\ud800"]


FORMAT = ". A data file is UTF-8: one JSON list of conversations, or one JSON object per line"


@pytest.mark.parametrize(
    ("content", "place", "message"),
    [
        (b"", "", "the file holds no conversations" + FORMAT),
        (b" \n\n", "", "the file holds no conversations" + FORMAT),
        (b" [ ]", "", "the file holds no conversations" + FORMAT),
        (b'[{"a": 1},\n {"a": 2 "b"}]', ":2:10", "not valid JSON: Expecting ',' delimiter" + FORMAT),
        (b'[{"a": 1}\n {"a": 2}]', ":2:2", "not valid JSON: expecting ',' or ']' after a record" + FORMAT),
        (b'[{"a": 1}, ', ":1:12", "not valid JSON: Expecting value" + FORMAT),
        (b'[{"a": 1}', ":1:10", "not valid JSON: expecting ',' or ']' after a record" + FORMAT),
        (b'[{"a": 1}]\n[]', ":2:1", "not valid JSON: more text after the end of the list" + FORMAT),
        (b'{"a": 1}\n\n{"a": \'b\'}', ":3:7", "not valid JSON: Expecting value" + FORMAT),
        (b'{"a": 1\r\n{"a": 2}', ":1:8", "not valid JSON: Expecting ',' delimiter" + FORMAT),
        (b'{"a": 1}{"a": 2}', ":1:9", "not valid JSON: more than one JSON value on the line" + FORMAT),
        (b'{\n "a": 1\n}', ":1:2", "not valid JSON: Expecting property name enclosed in double quotes" + FORMAT),
        (b'{"a": 1}\n{"a": ' + b"9" * 5000 + b"}", ":2:1", "not valid JSON: Exceeds the limit"),
        (b"[\n" + b"[" * 100_000, ":2:1", "not valid JSON: maximum recursion depth exceeded"),
        (b'{"a": 1}\n{"a": "\xff"}', ":2", "not UTF-8: byte 0xff at offset 16. Save the file as UTF-8"),
        (b'\xef\xbb\xbf[\n"\xc3(', ":2", "not UTF-8: byte 0xc3 at offset 6. Save the file as UTF-8"),
        ('{"a": 1}'.encode("utf-16"), ":1", "not UTF-8: byte 0xff at offset 0. Save the file as UTF-8"),
    ],
)
def test_faulty_files(tmp_path: Path, content: bytes, place: str, message: str) -> None:
    path = write(tmp_path / "chats.json", content)
    with pytest.raises(DataError, match="^" + re.escape(f"{path}{place}: {message}")) as error:
        list(read_records(path))
    assert "\n" not in str(error.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.json: no such file"):
        list(read_records(tmp_path / "nowhere.json"))
    with pytest.raises(DataError, match=r"is a folder\. Name a \.json or \.jsonl file"):
        list(read_records(tmp_path))
