"""What the toolkit gives, held against the plain reading."""

from __future__ import annotations

import logging
import re
import resource
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from chat.label_mask import IGNORE_INDEX
from data_utils import files, json_stream, parquet
from data_utils.dataset import BAD_RECORD, DataOptions, DataReader
from data_utils.examples import ExampleSet
from data_utils.report.terminal import render_report
from data_utils.sources import parse_source
from errors import DataError
from tests.fuzz_data.drafts import Case, Must
from tests.fuzz_data.plain import BAD, At, Sample, encoder, expected, plain_units, row_units

MOST_SECONDS = 8.0  # of a processor, for one mutation
MOST_MEMORY = 640 << 20  # above what the process takes before it reads anything
MOST_FAULTS = 20


@dataclass
class Reading:
    """What came of reading a file; ``wrong`` is what must never happen."""

    samples: list[tuple[At | None, Sample]] = field(default_factory=list)
    faults: list[At] = field(default_factory=list)
    skipped: list[At | None] = field(default_factory=list)
    skipped_total: int = 0
    is_refused: bool = False
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if self.is_refused:
            return f"faults at {self.faults}"
        return f"{[at for at, _ in self.samples]} without {self.skipped}"


@dataclass
class Result:
    """One mutation: what came of it when bad records are refused and when they are skipped, and what was wrong."""

    number: int
    kind: str
    outcomes: tuple[str, ...] = ()
    findings: list[str] = field(default_factory=list)
    seconds: float = 0.0


def _place(text: str, path: Path) -> At | None:
    """The place that a text begins with; ``None`` where it begins with none."""
    found = re.match(rf"{re.escape(str(path))}(?::(\d+))?(?::\d+)?(?: \(record (\d+)\))?(?=: |$)", text)
    if found is None:
        return None
    line, record = (None if group is None else int(group) for group in found.groups())
    return line, record


class _Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def _watched(reading: Reading) -> Iterator[None]:
    """Note what is raised, warnings, and lines in the log that cannot be shown."""
    log, logger = _Log(), logging.getLogger("data_utils")
    logger.addHandler(log)
    logger.propagate = False
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # that of a library in Rust is no Exception
        reading.wrong.append(f"{type(error).__name__}: {str(error)[:200]}")
    finally:
        logger.propagate = True
        logger.removeHandler(log)
    reading.wrong += [f"warns: {each.message}" for each in warned]
    reading.wrong += [f"logs {line!r}" for line in log.lines if not line.isprintable()]


def read(path: Path, skip_bad: bool) -> Reading:
    """Read a file as a run does."""
    reading = Reading()
    sources, options = {"train": [parse_source(str(path))]}, DataOptions(skip_bad=skip_bad)
    with _watched(reading):
        reader = DataReader(sources, encoder(), options, max_samples=2, show_progress=False)
        examples = ExampleSet(reader.reports["train"])
        try:
            for taken in reader.read():
                examples.add(taken)
        except DataError as error:
            reading.is_refused = True
            _read_message(str(error), path, reading)
        else:
            _read_account(examples, path, reading)
        _read_examples(examples, path, reading)
    return reading


def _read_examples(examples: ExampleSet, path: Path, reading: Reading) -> None:
    for index, example in enumerate(examples):
        ids, labels = example["input_ids"], example["labels"]
        weights = example.get("loss_weights") or [float(label != IGNORE_INDEX) for label in labels]
        reading.samples.append((_place(examples.where(index), path), Sample(tuple(ids), tuple(weights))))
        if labels != [id_ if weight else IGNORE_INDEX for id_, weight in zip(ids, weights, strict=True)]:
            reading.wrong.append(f"labels that are not the ids: {labels}")


def _read_message(message: str, path: Path, reading: Reading) -> None:
    lines = [re.sub(r"^  \d+\. ", "", line) for line in message.split("\n")]
    places = [_place(line, path) for line in lines]
    if len(lines) > 1:  # a heading, a line for each fault, and perhaps what to do
        places = places[1:] if places[-1] else places[1:-1]
    reading.faults = [at for at in places if at is not None]
    if not places or None in places:
        reading.wrong.append(f"a message that names no place: {message[:200]!r}")
    if len(reading.faults) > MOST_FAULTS:
        reading.wrong.append(f"{len(reading.faults)} faults are shown")
    reading.wrong += [f"a message that cannot be shown: {line[:200]!r}" for line in lines if not line.isprintable()]


def _read_account(examples: ExampleSet, path: Path, reading: Reading) -> None:
    report = examples.report
    [source] = report.sources
    report.as_dict()
    reading.skipped = [_place(place, path) for place in source.skipped.locations.get(BAD_RECORD, [])]
    reading.skipped_total = source.skipped.total
    if not source.in_file == source.read == source.kept + source.skipped.total:
        counts = f"{source.in_file} in the file, {source.read} read, {source.kept} kept, {source.skipped.total} skipped"
        reading.wrong.append(f"an account that does not add up: {counts}")
    if source.kept != len(examples):
        reading.wrong.append(f"{source.kept} kept, {len(examples)} examples")
    shown = render_report(report, color=False)
    if not shown.replace("\n", "").isprintable():
        reading.wrong.append("a report that cannot be shown")


def examine(case: Case, path: Path, number: int = 0) -> Result:
    """Read a damaged file both ways and compare."""
    path.write_bytes(case.data)
    result, started, peak = Result(number, case.kind), time.process_time(), _peak()
    with (
        patch.object(json_stream, "MAX_RECORD_BYTES", case.limit or json_stream.MAX_RECORD_BYTES),
        patch.object(files, "CHUNK_BYTES", case.chunk or files.CHUNK_BYTES),
        patch.object(parquet, "_BUFFER_BYTES", case.chunk or parquet._BUFFER_BYTES),
        patch.object(parquet, "_BATCH_ROWS", case.chunk or parquet._BATCH_ROWS),
    ):
        readings = [read(path, skip_bad) for skip_bad in (False, True)]
    result.seconds = time.process_time() - started
    for reading, mode in zip(readings, ("refusing", "skipping"), strict=True):
        result.findings += [f"{mode}: {wrong}" for wrong in reading.wrong]
    if result.seconds > MOST_SECONDS:
        result.findings.append(f"takes {result.seconds:.1f} s")
    if peak < _peak() > first_peak() + MOST_MEMORY:
        result.findings.append(f"takes {(_peak() - first_peak()) >> 20} MiB")
    if not any(reading.wrong for reading in readings):
        before = [sample for _, sample in expected(row_units(case.original))]
        result.outcomes = tuple(_outcome(reading, before) for reading in readings)
        result.findings += _differences(case, readings, before)
    return result


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@cache
def first_peak() -> int:
    encoder()
    return _peak()


def _outcome(reading: Reading, before: list[Any]) -> str:
    if reading.is_refused:
        return "refused"
    is_same = [sample for _, sample in reading.samples] == before
    return "same" if is_same else "skipped" if reading.skipped_total else "other"


def _differences(case: Case, readings: Sequence[Reading], before: list[Sample | str]) -> Iterator[str]:
    refusing, skipping = readings
    if case.must is Must.ANY or (case.must is Must.LOOSE and refusing.is_refused and skipping.is_refused):
        return
    if case.rows is not None:
        units, is_hidden = row_units(case.rows), False
    else:
        units, is_hidden = ([], True) if case.must is Must.REFUSED else plain_units(case.data)
    wanted = expected(units)
    bad = [at for at, sample in wanted if sample == BAD]
    if is_hidden:
        if not (refusing.is_refused and skipping.is_refused):
            yield f"is read, though a fault hides the rest: {refusing}; {skipping}"
        elif units and (refusing.faults[:-1] != bad or not _is_behind(refusing.faults[-1], units[-1].at)):
            yield f"refusing gives {refusing}, not faults at {bad} and behind {units[-1].at}"
        return
    kept = [(at, sample) for at, sample in wanted if isinstance(sample, Sample)]
    if case.must is Must.SAME and [sample for _, sample in wanted] != before:
        yield "is harmless, but the records no longer give the same samples"
    if case.must is Must.FAULTY and not bad:
        yield "has a fault that nothing refuses"
    if bad and (refusing.faults != bad[:MOST_FAULTS] or refusing.samples):
        yield f"refusing gives {refusing}, not faults at {bad}"
    if not bad:
        yield from _other_samples("refusing", refusing, kept, [])
    yield from _other_samples("skipping", skipping, kept, bad)
    if not skipping.is_refused and skipping.skipped_total != len(wanted) - len(kept):
        yield f"skipping counts {skipping.skipped_total}, not {len(wanted) - len(kept)}"


def _other_samples(mode: str, reading: Reading, kept: Sequence[tuple[At, Sample]], bad: Sequence[At]) -> Iterator[str]:
    places = [at for at, _ in kept]
    if reading.is_refused or [at for at, _ in reading.samples] != places or reading.skipped != bad[:100]:
        yield f"{mode} gives {reading}, not {places} without {bad}"
    else:
        other = [at for (at, sample), (_, wanted) in zip(reading.samples, kept, strict=True) if sample != wanted]
        if other:
            yield f"{mode} gives other samples at {other}"


def _is_behind(one: At, other: At) -> bool:
    return (one[0] or 0) >= (other[0] or 0)
