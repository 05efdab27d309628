"""A short run of the fuzzer, and that it finds what it is there for: data that is lost or changed, and bad refusals."""

from __future__ import annotations

import json
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_utils import dataset
from data_utils.dataset import DataReader
from data_utils.encode import Encoder, Example
from data_utils.examples import ExampleSet
from data_utils.files import Location, read_records
from data_utils.formats import Format
from data_utils.report.source_report import SourceReport
from errors import DataError
from tests.fuzz_data import examining, running
from tests.fuzz_data.damages import KINDS
from tests.fuzz_data.drafts import FORMATS, TEXTS, Case, Must
from tests.fuzz_data.examining import Result, examine
from tests.fuzz_data.plain import encoder, expected, row_units
from tests.fuzz_data.running import OUTCOMES, main, make_case, run, run_apart

SEED, COUNT = 20, 8 * len(KINDS)


def test_no_mutation_crashes_or_loses_anything(tmp_path: Path) -> None:
    results = list(run(SEED, range(COUNT), tmp_path))
    assert {result.kind for result in results} == set(KINDS)
    assert {outcome for result in results for outcome in result.outcomes} == set(OUTCOMES)
    found = [f"--seed {SEED} --only {each.number} ({each.kind}): {text}" for each in results for text in each.findings]
    assert found == []


@pytest.mark.parametrize("text", ["a", "word ", " ", "\n", "北", "1", "🙂", "e\u0301"])
def test_a_text_of_five_megabytes(text: str, tmp_path: Path) -> None:
    examining.first_peak.cache_clear()
    encoder.cache_clear()  # which keeps texts
    record = {"prompt": text * (5_000_000 // len(text.encode())), "response": "Answer"}
    assert findings(tmp_path, lines(*GOOD[:2], json.dumps(record), *GOOD[3:])) == []


def test_a_number_makes_the_same_file_again() -> None:
    once, again = ([make_case(3, number) for number in range(4 * len(KINDS))] for _ in range(2))
    assert once == again
    assert make_case(3, 0).data != make_case(4, 0).data


def test_valid_files_of_every_format_and_kind(tmp_path: Path) -> None:
    """They are read without a fault, and each of their samples says something else."""
    names = set()
    for number in range(0, 100 * len(KINDS), len(KINDS)):
        case = make_case(5, number)
        assert (case.kind, case.must) == ("unchanged", Must.SAME)
        result = examine(case, tmp_path / case.name)
        assert result.outcomes == ("same", "same") and not result.findings, case.name
        samples = [str(sample) for _, sample in expected(row_units(case.original))]
        assert len(set(samples)) == len(samples) >= 5
        names.add(case.name)
    assert names == {f"{format_}{suffix}" for format_ in FORMATS for suffix in TEXTS}


# -------------------------------------------------------------------------------------------------- what it has to find


RECORDS = [{"prompt": f"Question {number}?", "response": f"Answer {number}"} for number in range(5)]
GOOD = [json.dumps(record) for record in RECORDS]


def lines(*texts: str, must: Must = Must.READ) -> Case:
    return Case("test", "a.jsonl", "\n".join(texts).encode(), must, RECORDS)


def findings(folder: Path, case: Case) -> list[str]:
    return examine(case, folder / case.name).findings


WITH_FAULT = lines(*GOOD[:3], "{}", *GOOD[3:], must=Must.FAULTY)


def test_nothing_is_found_where_nothing_is_wrong(tmp_path: Path) -> None:
    assert findings(tmp_path, lines(*GOOD, must=Must.SAME)) == []
    assert findings(tmp_path, WITH_FAULT) == []


def places(*numbers: int) -> str:
    return str([(number, None) for number in numbers])


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda items: items.pop(2), f"gives {places(1, 2, 5, 6)} without {places(4)}"),
        (lambda items: items.pop(3), f"gives {places(1, 2, 3, 5, 6)} without []"),
        (lambda items: items.insert(2, items[1]), f"gives {places(1, 2, 2, 3, 5, 6)} without {places(4)}"),
        (lambda items: items.reverse(), f"gives {places(6, 5, 3, 2, 1)} without {places(4)}"),
        (lambda items: items[1][1].update(response="x"), f"gives other samples at {places(2)}"),
        (lambda items: items.insert(1, (items.pop(1)[0], items[0][1])), f"gives other samples at {places(2)}"),
    ],
    ids=["dropped", "fault dropped", "doubled", "reversed", "changed", "misplaced"],
)
def test_it_finds_records_that_are_not_those_of_the_file(
    change: Callable[[list[Any]], object], found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*arguments: Any) -> Iterator[tuple[Location, object]]:
        items = list(read_records(*arguments))
        change(items)
        yield from items

    monkeypatch.setattr(dataset, "read_records", read)
    [finding] = [each for each in findings(tmp_path, WITH_FAULT) if each.startswith("skipping gives")]
    assert finding.startswith(f"skipping {found}")


class Panic(BaseException):
    pass


def always(error: BaseException) -> Callable[..., Any]:
    def raise_it(*arguments: Any) -> Any:
        raise error

    return raise_it


@pytest.mark.parametrize("error", [KeyError(1), RecursionError("deep"), MemoryError("all"), Panic("overflow")])
def test_it_finds_other_errors(error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Encoder, "encode_conversation", always(error))
    text = f"{type(error).__name__}: {error}"
    assert findings(tmp_path, lines(*GOOD)) == [f"refusing: {text}", f"skipping: {text}"]


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (DataError("--data_path", "a fault"), "refusing: a message that names no place: '--data_path: a fault'"),
        (DataError("a.jsonl:4", "a fault"), "refusing: a message that names no place: 'a.jsonl:4: a fault'"),
    ],
)
def test_it_finds_messages_without_a_place(
    error: DataError, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DataReader, "_raise_faults", always(error))
    assert findings(tmp_path, WITH_FAULT)[0] == found


def test_it_finds_messages_that_steer_the_terminal_or_take_several_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parse(self: Format, record: object, where: Location) -> Any:
        raise DataError(str(where), "red \x1b[31m\nand more\nand more")

    monkeypatch.setattr(Format, "parse", parse)
    found = "\n".join(findings(tmp_path, lines(GOOD[0])))
    assert "refusing: a message that cannot be shown: " in found
    assert "refusing: a message that names no place: " in found
    assert "skipping: logs 'Skipped: " in found


def test_it_finds_places_that_are_not_those_of_the_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = Format.parse

    def parse_elsewhere(self: Format, record: object, where: Any) -> Any:
        return parse(self, record, where and where._replace(line=1))

    monkeypatch.setattr(Format, "parse", parse_elsewhere)
    assert f"refusing gives faults at {places(1)}, not faults at {places(4)}" in findings(tmp_path, WITH_FAULT)


def test_it_finds_more_faults_than_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = lines(*["{}"] * 30, GOOD[0], must=Must.FAULTY)
    assert findings(tmp_path, case) == []
    monkeypatch.setattr(dataset, "_MAX_LISTED_FAULTS", 25)
    assert findings(tmp_path, case)[0] == "refusing: 25 faults are shown"


def test_it_finds_records_that_are_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SourceReport, "skip", lambda *arguments: None)
    counts = "6 in the file, 5 read, 5 kept, 0 skipped"
    assert findings(tmp_path, WITH_FAULT) == [f"skipping: an account that does not add up: {counts}"]


def test_it_finds_warnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Encoder, "check_conversation", lambda *arguments: warnings.warn("it is old", stacklevel=1))
    assert findings(tmp_path, lines(*GOOD))[0] == "refusing: warns: it is old"


def test_it_finds_labels_that_are_not_the_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Shifted(ExampleSet):
        def __getitem__(self, index: int) -> Example:
            example = super().__getitem__(index)
            return {**example, "labels": [*example["labels"][1:], -100]}

    monkeypatch.setattr(examining, "ExampleSet", Shifted)
    assert findings(tmp_path, lines(GOOD[0]))[0].startswith("refusing: labels that are not the ids: [-100, ")


def test_it_finds_what_takes_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examining, "MOST_SECONDS", 0)
    assert findings(tmp_path, lines(*GOOD)) == ["takes 0.0 s"]


def test_it_finds_what_takes_much_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examining.first_peak()
    monkeypatch.setattr(examining, "_peak", iter([0, 2 << 40, 2 << 40, 2 << 40]).__next__)
    [found] = findings(tmp_path, lines(*GOOD))
    assert found.startswith("takes ") and found.endswith(" MiB")


@pytest.mark.parametrize(
    ("case", "found"),
    [
        (lines(*GOOD, must=Must.FAULTY), "has a fault that nothing refuses"),
        (lines(*GOOD[1:], must=Must.SAME), "is harmless, but the records no longer give the same samples"),
        (lines(*GOOD, must=Must.REFUSED), "is read, though a fault hides the rest: "),
    ],
)
def test_it_finds_what_does_not_come_to_what_it_must(case: Case, found: str, tmp_path: Path) -> None:
    [finding] = findings(tmp_path, case)
    assert finding.startswith(found)


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="another process would not see the change")
@pytest.mark.parametrize(
    ("end", "found"), [(lambda: os._exit(7), "ends the process with 7"), (lambda: os.kill(os.getpid(), 9), "with -9")]
)
def test_a_process_that_dies_is_a_finding(
    end: Callable[[], object], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = examine

    def dying(case: Case, path: Path, number: int) -> Result:
        if number == 2:
            end()
        return real(case, path, number)

    monkeypatch.setattr(running, "examine", dying)
    results = list(run_apart(1, range(4)))
    assert [(result.number, bool(result.findings)) for result in results] == [
        (0, False),
        (1, False),
        (2, True),
        (3, False),
    ]
    assert results[2].findings[0].endswith(found) and results[2].kind == make_case(1, 2).kind


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["--count", "3", "--seed", "1"]) == 0
    head, names, *rows, total = capsys.readouterr().out.splitlines()
    assert "bad records refused" in head and names.startswith("kind") and len(rows) == 3
    assert rows[0].split()[:2] == ["unchanged", "1"] and total.split()[:2] == ["all", "3"]
    monkeypatch.setattr(examining, "read", lambda path, skip_bad: examining.Reading(wrong=["bites"]))
    keep = tmp_path / "kept"
    assert main(["--only", "1", "--seed", "1", "--keep", str(keep)]) == 1
    assert capsys.readouterr().out.startswith("--seed 1 --only 1 (byte_order_mark): refusing: bites\n")
    case = make_case(1, 1)
    assert [(path.name, path.read_bytes()) for path in keep.iterdir()] == [(f"1-1-{case.name}", case.data)]
