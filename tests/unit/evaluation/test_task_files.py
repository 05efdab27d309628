"""Files of the benchmarks are read as they are published; anything else is refused with its place."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import pytest

from errors import ConfigError, DataError
from evaluation.task_files import read_subjects
from evaluation.task_prompts import build_items
from tests.golden import REPO

BENCHMARKS = REPO / "tests" / "references" / "benchmarks"


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("ceval", {"daily_life": (5, 3), "simple_words": (5, 1)}),
        ("cmmlu", {"seasons": (5, 2)}),
        ("mmlu", {"common_things": (5, 2), "plain_arithmetic": (5, 3)}),
        ("gsm8k", {"gsm8k": (8, 2)}),
        ("humaneval", {"humaneval": (0, 2)}),
    ],
)
def test_published_files_are_read(name: str, sizes: dict[str, tuple[int, int]]) -> None:
    subjects = read_subjects(name, BENCHMARKS)
    assert {each.name: (len(each.examples), len(each.questions)) for each in subjects} == sizes


def test_questions_have_their_lines_and_values() -> None:
    things, _ = read_subjects("mmlu", BENCHMARKS)
    assert things.questions[1].where.endswith("common_things_test.csv:2")  # a question of two lines
    assert things.questions[1].fields == {
        "question": "Which sentence is a question?\nRead them all.", "A": "Go.", "B": "It rains.", "C": "Why?",
        "D": 'He said: "No."', "answer": "C",
    }  # fmt: skip
    [seasons] = read_subjects("cmmlu", BENCHMARKS)
    assert seasons.examples[4].fields["question"] == "一年有几个季节？" and seasons.examples[4].fields["answer"] == "B"


def test_a_compressed_file_has_the_same_questions(tmp_path: Path) -> None:
    (tmp_path / "humaneval").mkdir()
    text = (BENCHMARKS / "humaneval" / "HumanEval.jsonl").read_bytes()
    (tmp_path / "humaneval" / "HumanEval.jsonl.gz").write_bytes(gzip.compress(text))
    [packed], [plain] = read_subjects("humaneval", tmp_path), read_subjects("humaneval", BENCHMARKS)
    assert [each.fields for each in packed.questions] == [each.fields for each in plain.questions]
    (tmp_path / "humaneval" / "HumanEval.jsonl.gz").write_bytes(gzip.compress(text)[:-20])
    with pytest.raises(DataError, match=r"HumanEval\.jsonl\.gz: cannot be unpacked"):
        read_subjects("humaneval", tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        (
            "ceval",
            "val/daily_life_val.csv",
            "mmlu/test/common_things_test.csv",
            r":1: is no file of ceval: its first line",
        ),
        (
            "mmlu",
            "test/common_things_test.csv",
            "ceval/val/daily_life_val.csv",
            r":1: has 7 values, not 6\. A file of mmlu",
        ),
        ("cmmlu", "test/seasons.csv", "ceval/val/daily_life_val.csv", r":1: is no file of cmmlu"),
        ("gsm8k", "test.jsonl", "humaneval/HumanEval.jsonl", r"test\.jsonl:1: has no text 'question'"),
        ("humaneval", "HumanEval.jsonl", "gsm8k/test.jsonl", r"HumanEval\.jsonl:1: has no text 'task_id'"),
        ("mmlu", "test/common_things_test.csv", b"", r"common_things_test\.csv: contains no questions"),
        ("ceval", "val/daily_life_val.csv", b"id,question,A,B,C,D,answer\n", r"contains no questions"),
        ("gsm8k", "test.jsonl", b"\n", r"test\.jsonl: contains no questions"),
        (
            "gsm8k",
            "test.jsonl",
            b'{"question": "a", "answer": "b"}\n',
            r"test\.jsonl:1: the answer does not end with ####",
        ),
        ("gsm8k", "test.jsonl", b'{"question"', r"test\.jsonl:1: is no JSON"),
        (
            "mmlu",
            "test/common_things_test.csv",
            b"a,b,c,d,e,A\na,b,c,d,e,E\n",
            r":2: the answer 'E' is none of A, B, C, D",
        ),
        ("mmlu", "test/common_things_test.csv", b'a,"b', r":1: is no CSV"),
        (
            "mmlu",
            "test/common_things_test.csv",
            "一年,b,c,d,e,A\n".encode("gbk"),
            r"common_things_test\.csv: is not UTF-8",
        ),
        ("mmlu", "test", None, r"has no files \*_test\.csv"),
        ("mmlu", "dev/common_things_dev.csv", None, r"--num_fewshot 5: mmlu has 0 examples of common_things"),
        ("gsm8k", "train.jsonl", None, r"there is no file .*train\.jsonl"),
        ("humaneval", "HumanEval.jsonl", None, r"there is no file .*HumanEval\.jsonl"),
    ],
)
def test_other_files_are_refused(
    tmp_path: Path, name: str, file: str, content: str | bytes | None, message: str
) -> None:
    shutil.copytree(BENCHMARKS, tmp_path / "data")
    path = tmp_path / "data" / name / file
    if content is None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    else:
        path.write_bytes((BENCHMARKS / content).read_bytes() if isinstance(content, str) else content)
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        build_items(name, read_subjects(name, tmp_path / "data"), None, None, 0, False)
    assert "\n" not in str(caught.value)
