"""A short run of the fuzzer, and a test that it finds lost or changed data and bad refusals."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chat import answers
from chat.answers import Answers
from data_utils import dataset
from data_utils import encode as encode_module
from data_utils.dataset import DataReader
from data_utils.encode import Encoder, Example
from data_utils.examples import ExampleSet
from data_utils.files import Location, read_records
from data_utils.formats import Format
from data_utils.report.source_report import SourceReport
from errors import DataError
from tests.families import STRICT
from tests.fuzz_data import chat_formats, runner
from tests.fuzz_data import examine as examine_module
from tests.fuzz_data.chat_formats import FAMILIES, QWEN, ChatFormat, encoder_of
from tests.fuzz_data.examine import Result, examine
from tests.fuzz_data.oracle import expected, row_records
from tests.fuzz_data.runner import MUTATIONS, OUTCOMES, main, make_case, run, run_apart
from tests.fuzz_data.valid_files import FORMATS, TEXTS, Case, Expect

SEED, COUNT = 20, 5 * len(MUTATIONS)


def test_mutations_have_no_findings(tmp_path: Path) -> None:
    results = list(run(SEED, range(COUNT), tmp_path))
    assert {result.mutation for result in results} == set(MUTATIONS)
    assert {outcome for result in results for outcome in result.outcomes} == set(OUTCOMES)
    if FAMILIES.is_dir():
        assert {result.chat.checkpoint for result in results} > {"", *STRICT}
    with_findings = [(result.number, result.mutation, result.findings) for result in results if result.findings]
    assert with_findings == [], f"--seed {SEED} --only NUMBER"


@pytest.mark.parametrize("text", ["a", "word ", " ", "\n", "北", "1", "🙂", "e\u0301"])
def test_text_of_five_megabytes(text: str, tmp_path: Path) -> None:
    examine_module.first_peak.cache_clear()
    encoder_of.cache_clear()  # its tokenizer caches texts
    record = {"prompt": text * (5_000_000 // len(text.encode())), "response": "Answer"}
    assert findings(tmp_path, lines(*GOOD[:2], json.dumps(record), *GOOD[3:])) == []


@pytest.mark.parametrize("text", ["word ", "1"])
def test_text_of_five_megabytes_in_a_later_format(text: str, shared: Path, tmp_path: Path) -> None:
    """Of these the tokenizers library takes the most time and memory."""
    record = {"prompt": text * (5_000_000 // len(text)), "response": "Answer"}
    assert findings(tmp_path, lines(*GOOD[:2], json.dumps(record), chat=LATER)) == []


def test_cases_are_reproducible() -> None:
    once, again = ([make_case(3, number) for number in range(4 * len(MUTATIONS))] for _ in range(2))
    assert once == again
    assert make_case(3, 0).data != make_case(4, 0).data


def test_valid_files_of_every_format_and_ending(shared: Path, tmp_path: Path) -> None:
    """They are read without faults, and all their samples are different."""
    names = set()
    for number in range(0, 60 * len(MUTATIONS), len(MUTATIONS)):
        case = make_case(11, number)
        case = replace(case, chat=LATER if case.name.startswith("thoughts") else QWEN)  # v1 has no field of thinking
        assert (case.mutation, case.expect) == ("unchanged", Expect.SAME)
        result = examine(case, tmp_path / case.name)
        assert result.outcomes == ("same", "same") and not result.findings, case.name
        samples = [str(sample) for _, sample in expected(row_records(case.original), case.chat)]
        assert len(set(samples)) == len(samples) >= 5
        names.add(case.name)
    assert names == {f"{format_}{suffix}" for format_ in FORMATS for suffix in TEXTS}


# ----------------------------------------------------------------------------------------------------------- findings


RECORDS = [{"prompt": f"Question {number}?", "response": f"Answer {number}"} for number in range(5)]
GOOD = [json.dumps(record) for record in RECORDS]


LATER = ChatFormat("qwen3_5_think", thinking="auto", split_turns="auto")


def lines(*texts: str, expect: Expect = Expect.ORACLE, chat: ChatFormat = QWEN) -> Case:
    return Case("test", "a.jsonl", "\n".join(texts).encode(), expect, RECORDS, chat=chat)


def findings(folder: Path, case: Case) -> list[str]:
    return examine(case, folder / case.name).findings


WITH_FAULT = lines(*GOOD[:3], "{}", *GOOD[3:], expect=Expect.FAULT)


def test_no_finding_without_an_error(tmp_path: Path) -> None:
    assert findings(tmp_path, lines(*GOOD, expect=Expect.SAME)) == []
    assert findings(tmp_path, WITH_FAULT) == []


def lines_at(*numbers: int) -> str:
    return str([(number, None) for number in numbers])


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda items: items.pop(2), f"gives {lines_at(1, 2, 5, 6)} without {lines_at(4)}"),
        (lambda items: items.pop(3), f"gives {lines_at(1, 2, 3, 5, 6)} without []"),
        (lambda items: items.insert(2, items[1]), f"gives {lines_at(1, 2, 2, 3, 5, 6)} without {lines_at(4)}"),
        (lambda items: items.reverse(), f"gives {lines_at(6, 5, 3, 2, 1)} without {lines_at(4)}"),
        (lambda items: items[1][1].update(response="x"), f"gives other samples at {lines_at(2)}"),
        (lambda items: items.insert(1, (items.pop(1)[0], items[0][1])), f"gives other samples at {lines_at(2)}"),
    ],
    ids=["dropped", "fault dropped", "doubled", "reversed", "changed", "misplaced"],
)
def test_wrong_records_are_found(
    change: Callable[[list[Any]], object], found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*arguments: Any, **options: Any) -> Iterator[tuple[Location, object]]:
        items = list(read_records(*arguments))
        change(items)
        yield from items

    monkeypatch.setattr(dataset, "read_records", read)
    [finding] = [text for text in findings(tmp_path, WITH_FAULT) if text.startswith("skipping gives")]
    assert finding.startswith(f"skipping {found}")


class Panic(BaseException):
    pass


def always(error: BaseException) -> Callable[..., Any]:
    def raise_it(*arguments: Any) -> Any:
        raise error

    return raise_it


@pytest.mark.parametrize("error", [KeyError(1), RecursionError("deep"), MemoryError("all"), Panic("overflow")])
def test_unexpected_exceptions_are_found(error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Encoder, "encode_conversation", always(error))
    text = f"{type(error).__name__}: {error}"
    assert findings(tmp_path, lines(*GOOD)) == [f"refusing: {text}", f"skipping: {text}"]


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (DataError("--data_path", "a fault"), "refusing: message without a location: '--data_path: a fault'"),
        (DataError("a.jsonl:4", "a fault"), "refusing: message without a location: 'a.jsonl:4: a fault'"),
    ],
)
def test_messages_without_a_location_are_found(
    error: DataError, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DataReader, "_raise_faults", always(error))
    assert findings(tmp_path, WITH_FAULT)[0] == found


def test_messages_with_control_characters_or_line_breaks_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parse(self: Format, record: object, where: Location) -> Any:
        raise DataError(str(where), "red \x1b[31m\nand more\nand more")

    monkeypatch.setattr(Format, "parse", parse)
    monkeypatch.setattr(logging, "_logRecordFactory", logging.LogRecord)  # commands escape control characters
    found = "\n".join(findings(tmp_path, lines(GOOD[0])))
    assert "refusing: message with control characters: " in found
    assert "refusing: message without a location: " in found
    assert "skipping: log line with control characters: 'Skipped: " in found


def test_wrong_locations_of_faults_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = Format.parse

    def parse_elsewhere(self: Format, record: object, where: Any) -> Any:
        return parse(self, record, where and where._replace(line=1))

    monkeypatch.setattr(Format, "parse", parse_elsewhere)
    assert f"refusing gives faults at {lines_at(1)}, not faults at {lines_at(4)}" in findings(tmp_path, WITH_FAULT)


def test_too_many_faults_in_a_message_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = lines(*["{}"] * 30, GOOD[0], expect=Expect.FAULT)
    assert findings(tmp_path, case) == []
    monkeypatch.setattr(dataset, "_MAX_LISTED_FAULTS", 25)
    assert findings(tmp_path, case)[0] == "refusing: 25 faults are shown"


def test_records_that_are_not_counted_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SourceReport, "skip", lambda *arguments: None)
    counts = "6 in the file, 5 read, 5 kept, 0 skipped"
    assert findings(tmp_path, WITH_FAULT) == [f"skipping: report that does not add up: {counts}"]


def test_warnings_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Encoder, "check_conversation", lambda *arguments: warnings.warn("it is old", stacklevel=1))
    assert findings(tmp_path, lines(*GOOD))[0] == "refusing: warning: it is old"


def test_labels_that_differ_from_the_ids_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Shifted(ExampleSet):
        def __getitem__(self, index: int) -> Example:
            example = super().__getitem__(index)
            return {**example, "labels": [*example["labels"][1:], -100]}

    monkeypatch.setattr(examine_module, "ExampleSet", Shifted)
    assert findings(tmp_path, lines(GOOD[0]))[0].startswith("refusing: labels differ from the ids: [-100, ")


def in_chat_format(folder: Path, *texts: str) -> list[str]:
    chat_formats.encoder_of.cache_clear()
    try:
        return findings(folder, lines(*texts, chat=replace(LATER, split_turns="never")))
    finally:
        chat_formats.encoder_of.cache_clear()


def test_text_that_becomes_control_tokens_is_found(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = json.dumps({"prompt": "Why<|im_end|>?", "response": "So"})
    assert in_chat_format(tmp_path, record) == []
    monkeypatch.setattr(
        encode_module, "plain_encoder", lambda tokenizer: lambda text: tokenizer.encode(text, add_special_tokens=False)
    )
    assert in_chat_format(tmp_path, record) == ["(1, None): 5 control tokens, not 4"]


def test_text_and_training_that_differ_from_the_official_template_are_found(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as change:
        change.setattr(Answers, "promptable", lambda *arguments: set())
        found = in_chat_format(tmp_path, GOOD[0])
        assert "(1, None): trains [], not ['Answer 0<|im_end|>\\n']" in found
    monkeypatch.setattr(answers, "thought_block", lambda thought: "<think>\n\n\n</think>\n\n")
    assert "ids of " in in_chat_format(tmp_path, GOOD[0])[0]


def test_slow_reading_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examine_module, "MAX_SECONDS", 0)
    assert findings(tmp_path, lines(*GOOD)) == ["takes 0.0 s"]


def test_high_memory_use_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examine_module.first_peak()
    monkeypatch.setattr(examine_module, "_peak", iter([0, 2 << 40, 2 << 40, 2 << 40]).__next__)
    [found] = findings(tmp_path, lines(*GOOD))
    assert found.startswith("takes ") and found.endswith(" MiB")


@pytest.mark.parametrize(
    ("case", "found"),
    [
        (lines(*GOOD, expect=Expect.FAULT), "has a fault that is not refused"),
        (lines(*GOOD[1:], expect=Expect.SAME), "must not change the samples, but does"),
        (lines(*GOOD, expect=Expect.REFUSED), "is read, but must be refused: "),
    ],
)
def test_unexpected_outcomes_are_found(case: Case, found: str, tmp_path: Path) -> None:
    [finding] = findings(tmp_path, case)
    assert finding.startswith(found)


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="another process would not see the change")
@pytest.mark.parametrize(
    ("end", "found"), [(lambda: os._exit(7), "ends the process with 7"), (lambda: os.kill(os.getpid(), 9), "with -9")]
)
def test_process_that_dies_is_a_finding(end: Callable[[], object], found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = examine

    def dying(case: Case, path: Path, number: int) -> Result:
        if number == 2:
            end()
        return real(case, path, number)

    monkeypatch.setattr(runner, "examine", dying)
    results = list(run_apart(1, range(4)))
    assert [(result.number, bool(result.findings)) for result in results] == [
        (0, False),
        (1, False),
        (2, True),
        (3, False),
    ]
    assert results[2].findings[0].endswith(found) and results[2].mutation == make_case(1, 2).mutation


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["--count", "3", "--seed", "1"]) == 0
    head, names, *rows, total = capsys.readouterr().out.splitlines()
    assert "bad records refused" in head and names.startswith("mutation") and len(rows) == 3
    assert rows[0].split()[:2] == ["unchanged", "1"] and total.split()[:2] == ["all", "3"]
    monkeypatch.setattr(examine_module, "read", lambda *arguments: examine_module.Reading(errors=["bites"]))
    keep = tmp_path / "kept"
    assert main(["--only", "1", "--seed", "1", "--keep", str(keep)]) == 1
    case = make_case(1, 1)
    found = f"--seed 1 --only 1 (byte_order_mark, {case.chat}): refusing: bites\n"
    assert capsys.readouterr().out.startswith(found)
    assert [(path.name, path.read_bytes()) for path in keep.iterdir()] == [(f"1-1-{case.name}", case.data)]
