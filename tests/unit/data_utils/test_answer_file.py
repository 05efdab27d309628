"""A file of answers goes on after a kill, belongs to one process, and takes no line that is not its own."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

import pytest

from data_utils.answer_file import AnswerFile
from data_utils.prompts import prompt_key
from errors import ConfigError, DataError
from tests.commands import limited_file_size

RUN = {"n": 2, "data_sha256": "x"}
PROMPTS = [[{"role": "user", "content": text}] for text in ("a", "b\u2028", "c\ud800")]
KEYS = array("Q", [prompt_key({"messages": prompt}) for prompt in PROMPTS])


def answer(number: int) -> dict[str, Any]:
    text = f"answer {number} 你"
    return {"messages": [*PROMPTS[number // 2], {"role": "assistant", "content": text}], "answer": text}


def open_file(path: Path, **run: Any) -> AnswerFile:
    return AnswerFile(path, RUN | run, KEYS, 2)


def write(path: Path, *numbers: int) -> Path:
    with open_file(path) as file:
        for number in numbers:
            file.add(number, answer(number))
    return path


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    return write(tmp_path / "whole.jsonl", *range(6)).read_bytes()


def test_killed_run_goes_on_at_every_byte(tmp_path: Path, whole: bytes) -> None:
    path = write(tmp_path / "a.jsonl", 0)
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        with open_file(path) as file:
            assert file.count == whole[:size].count(b"\n")
            for number in range(6):
                if number not in file:
                    file.add(number, answer(number))
            file.finish()
        assert path.read_bytes() == whole


def test_answers_that_were_missing_are_brought_in_order(tmp_path: Path, whole: bytes) -> None:
    path = write(tmp_path / "a.jsonl", 1, 4)
    with open_file(path) as file:
        assert file.missing == 4
        file.add(0, answer(0))
    with open_file(path) as file:
        for number in (2, 3, 5):
            file.add(number, answer(number))
        file.finish()
    assert path.read_bytes() == whole


def test_errors_are_in_a_file_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with open_file(path) as file:
        file.add(0, answer(0))
        file.add_error(1, "q.txt:1", "too long")
        file.finish()
        assert (file.count, file.failed, file.missing) == (1, 1, 5)
    assert json.loads(file.errors_path.read_text()) == {
        "index": 0,
        "choice": 1,
        "where": "q.txt:1",
        "error": "too long",
    }
    with open_file(path) as file:
        file.add_error(2, "q.txt:2", "no memory")
    assert "too long" not in file.errors_path.read_text()
    with open_file(path) as file:
        file.finish()
    assert not file.errors_path.exists()


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (b"", "is damaged"),
        (b"nothing", "is damaged"),
        (b"\0\0\0", "is damaged"),
        (b"\xff", "is damaged"),
        (b"[" * 100_000, "is damaged"),
        (b'{"index": 0, "choice": 1, "error": "too long"}', "is damaged"),
        ({**answer(0), "index": True, "choice": 1}, "is damaged"),
        ({**answer(0), "index": 0, "choice": 1, "messages": []}, "is damaged"),
        ({**answer(0), "index": 0, "choice": 1, "messages": PROMPTS[0]}, "is damaged"),
        ({"text": "Once", "answer": "upon", "index": 0, "choice": 1}, "is damaged"),
        ({**answer(0), "index": 3, "choice": 0}, "has index 3 and choice 0 of 3 prompts with 2 answers"),
        ({**answer(0), "index": 0, "choice": -1}, "has index 0 and choice -1"),
        ({**answer(2), "index": 0, "choice": 1}, "answers another prompt"),
        ({"text": "Once", "answer": "", "index": 0, "choice": 1}, "answers another prompt"),
        ({**answer(0), "index": 0, "choice": 0}, "answers what an earlier line has answered"),
    ],
)
def test_line_that_is_not_of_the_run_is_refused(tmp_path: Path, line: Any, match: str) -> None:
    path = write(tmp_path / "a.jsonl", 0, 2)
    first, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + (line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" + last)
    before = path.read_bytes()
    with pytest.raises(DataError, match=rf"a\.jsonl:2: {match}.*Remove the line"), open_file(path):
        pass
    assert path.read_bytes() == before
    path.write_bytes(first + last)
    with open_file(path) as file:
        assert file.count == 2


def test_file_of_another_run_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 0)
    for run, match in (
        ({"n": 3}, "is of a run with --n 2, not 3"),
        ({"data_sha256": "y"}, "other prompts than --data_path has now"),
        ({"adapter.weights_sha256": "y"}, "other weights than --adapter has now"),
    ):
        with pytest.raises(ConfigError, match=match), open_file(path, **run):
            pass
    for content in ("", "5", "{"):
        (tmp_path / "a.jsonl.run").write_text(content)
        with pytest.raises(ConfigError, match="--output"), open_file(path):
            pass


def test_file_that_another_process_writes_is_refused(tmp_path: Path) -> None:
    with open_file(tmp_path / "a.jsonl"), pytest.raises(ConfigError, match="--output"), open_file(tmp_path / "a.jsonl"):
        pass
    assert list(tmp_path.iterdir()) == []  # nothing was answered


def test_full_disk_leaves_whole_lines(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "a.jsonl"
    with open_file(path) as file:
        with limited_file_size(len(whole) // 2), pytest.raises(OSError, match=r"a\.jsonl"):
            for number in range(6):
                file.add(number, answer(number))
        assert 0 < file.count < 6
    assert path.read_bytes() == whole[: path.stat().st_size] and path.read_bytes().endswith(b"\n")
    with open_file(path) as file:
        for number in range(file.count, 6):
            file.add(number, answer(number))
    assert path.read_bytes() == whole
