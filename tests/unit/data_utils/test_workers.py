"""Several processes prepare the same examples, reports and messages as one, and none of them is left behind."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from chat.families import QWEN_V1
from data_utils.dataset import DataOptions, DataReader
from data_utils.encode import EncodeOptions, Encoder
from data_utils.prepared import load_examples
from data_utils.sources import parse_source
from data_utils.workers import Workers
from errors import DataError, RunError
from qwen_model.tokenization_qwen import QWenTokenizer
from tests.models import TINY


def write(folder: Path, name: str, bad: int) -> Path:
    """Write 300 records, of which every ``bad``th has no answer, every 50th is too long and every 70th not JSON."""
    records = []
    for number in range(300):
        turns = [{"from": "user", "value": f"{number}" * (60 if number % 50 == 7 else 1)}]
        if not bad or number % bad != 3:
            turns.append({"from": "assistant", "value": "Hello {{name}}!" if number % 9 == 0 else f"So {number % 40}."})
        records.append(json.dumps({"conversations": turns}))
    if name.endswith(".jsonl"):
        text = "\n".join(record[:-1] if bad and number % 70 == 69 else record for number, record in enumerate(records))
    else:
        text = "[" + ",\n".join(records) + "]"
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def reader(processes: int, *paths: object, **options: Any) -> DataReader:
    encoder = Encoder(QWenTokenizer.from_pretrained(TINY), QWEN_V1, EncodeOptions(max_length=64))
    sources = {"train": [parse_source(str(path)) for path in paths]}
    return DataReader(sources, encoder, DataOptions(**options), max_samples=3, show_progress=False, processes=processes)


def test_two_processes_prepare_what_one_does(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines, whole = write(tmp_path, "a.jsonl", 11), write(tmp_path, "b.json", 0)
    results, messages = [], []
    for processes in (1, 2):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            sets = load_examples(
                reader(processes, lines, f"{whole}#200@x2", skip_bad=True, eval_share=0.1, fill={"name": "Linden"})
            )
        results.append(
            {
                name: (list(each), each.digest(), [each.where(index) for index in range(len(each))], each.report)
                for name, each in sets.items()
            }
        )
        messages.append(caplog.messages[:])
    (one, two), (told, told_again) = results, messages
    assert one.keys() == two.keys() == {"train", "eval"}
    for name in one:
        assert one[name][:3] == two[name][:3]
        assert one[name][3].as_dict() == two[name][3].as_dict()
        assert one[name][3].samples == two[name][3].samples
    assert told == told_again
    assert sum("Skipped: " in message for message in told) == 5


def test_two_processes_find_the_same_faults(tmp_path: Path) -> None:
    others = set(multiprocessing.active_children())  # of templates that other tests have used
    paths = write(tmp_path, "a.jsonl", 60), write(tmp_path, "b.jsonl", 13)
    errors = []
    for processes in (1, 2):
        with pytest.raises(DataError) as caught:
            load_examples(reader(processes, *paths))
        errors.append(str(caught.value))
        assert not set(multiprocessing.active_children()) - others
    assert errors[0] == errors[1]
    assert "the first 20 faults" in errors[0]


class Target:
    def die(self, number: int) -> int:
        if number == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    def wait(self) -> int:
        time.sleep(0.05)
        return os.getpid()


def test_dead_worker_is_one_line() -> None:
    others = set(multiprocessing.active_children())  # of templates that other tests have used
    with pytest.raises(RunError) as caught, Workers(Target(), 2) as workers:
        list(workers.map("die", ((number,) for number in range(20))))
    assert str(caught.value).startswith("--dataset_num_proc 2: a worker process has died. Most often memory ran out")
    assert not set(multiprocessing.active_children()) - others


def test_interrupt_leaves_no_process() -> None:
    others = set(multiprocessing.active_children())  # of templates that other tests have used
    with pytest.raises(KeyboardInterrupt), Workers(Target(), 2) as workers:
        for _ in workers.map("wait", (() for _ in range(1000))):
            raise KeyboardInterrupt
    assert not set(multiprocessing.active_children()) - others


def test_workers_end_with_a_killed_parent() -> None:
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        with Workers(Target(), 2) as workers:
            for process in workers.map("wait", (() for _ in range(10_000))):
                os.write(writing, b"%d\n" % process)
        os._exit(0)
    os.close(writing)
    found: set[int] = set()
    with open(reading) as lines:
        while len(found) < 2:
            found.add(int(lines.readline()))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        lines.read()  # until the last writer has ended
    assert len(found) == 2
