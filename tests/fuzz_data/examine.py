"""Read mutated files with the toolkit, and compare the result with the oracle."""

from __future__ import annotations

import logging
import re
import resource
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unicodedata import bidirectional, category
from unittest.mock import patch

from chat.label_mask import IGNORE_INDEX
from data_utils import files, json_stream, parquet
from data_utils.dataset import DataOptions, DataReader
from data_utils.examples import ExampleSet, ExampleWriter
from data_utils.records import BAD_RECORD
from data_utils.report.terminal import render_report
from data_utils.sources import parse_source
from errors import DataError
from tests.fuzz_data.chat_formats import QWEN, ChatFormat, encoder_of
from tests.fuzz_data.oracle import BAD, At, Sample, expected, oracle_records, row_records
from tests.fuzz_data.valid_files import Case, Expect

MAX_SECONDS = 8.0  # CPU time for one mutation
MAX_MEMORY = 640 << 20  # bytes beyond the peak before anything is read
MAX_FAULTS = 20
# What controls a terminal, or the direction of text; other spaces and joiners are letters of a text.
_CONTROLS = ("Cc", "Cs", "Zl", "Zp")
_DIRECTIONS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


@dataclass
class Reading:
    """The result of reading a file; ``errors`` describes what must never happen."""

    samples: list[tuple[At | None, Sample]] = field(default_factory=list)
    faults: list[At] = field(default_factory=list)
    skipped: list[At | None] = field(default_factory=list)
    skipped_total: int = 0
    is_refused: bool = False
    errors: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if self.is_refused:
            return f"faults at {self.faults}"
        return f"{[at for at, _ in self.samples]} without {self.skipped}"


@dataclass
class Result:
    """The result of one mutation: outcomes with bad records refused and skipped, and findings (differences, errors)."""

    number: int
    mutation: str
    chat: ChatFormat = QWEN
    outcomes: tuple[str, ...] = ()
    findings: list[str] = field(default_factory=list)
    seconds: float = 0.0


def _location(text: str, path: Path) -> At | None:
    """Return the location at the start of a text, or ``None``."""
    match = re.match(rf"{re.escape(str(path))}(?::(\d+))?(?::\d+)?(?: \(record (\d+)\))?(?=: |$)", text)
    if match is None:
        return None
    line, record = (None if group is None else int(group) for group in match.groups())
    return line, record


class _LogRecorder(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def _recorded_errors(reading: Reading) -> Iterator[None]:
    """Record unexpected exceptions, warnings, and log lines with control characters."""
    log, logger = _LogRecorder(), logging.getLogger("data_utils")
    logger.addHandler(log)
    logger.propagate = False
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of a library in Rust is not an Exception
        reading.errors.append(f"{type(error).__name__}: {str(error)[:200]}")
    finally:
        logger.propagate = True
        logger.removeHandler(log)
    reading.errors += [f"warning: {warning.message}" for warning in caught]
    reading.errors += [f"log line with control characters: {line!r}" for line in log.lines if not line.isprintable()]


def read(path: Path, chat: ChatFormat, skip_bad: bool) -> Reading:
    """Read a file like a training run."""
    reading = Reading()
    sources, options = {"train": [parse_source(str(path))]}, DataOptions(skip_bad=skip_bad)
    with _recorded_errors(reading), tempfile.TemporaryDirectory() as folder:
        reader = DataReader(sources, encoder_of(chat), options, max_samples=2, show_progress=False)
        writer = ExampleWriter(Path(folder, "train"))
        try:
            for block in reader.read_blocks():
                writer.add(block, "train")
        except DataError as error:
            reading.is_refused = True
            _read_message(str(error), path, reading)
        examples = ExampleSet(Path(folder, "train"), writer.finish(), reader.reports["train"])
        if not reading.is_refused:
            _read_report(examples, path, reading)
        _read_examples(examples, path, reading)
    return reading


def _read_examples(examples: ExampleSet, path: Path, reading: Reading) -> None:
    for index, example in enumerate(examples):
        ids, labels = example["input_ids"], example["labels"]
        weights = example.get("loss_weights") or [float(label != IGNORE_INDEX) for label in labels]
        reading.samples.append((_location(examples.where(index), path), Sample(tuple(ids), tuple(weights))))
        if labels != [id_ if weight else IGNORE_INDEX for id_, weight in zip(ids, weights, strict=True)]:
            reading.errors.append(f"labels differ from the ids: {labels}")


def _read_message(message: str, path: Path, reading: Reading) -> None:
    lines = [re.sub(r"^  \d+\. ", "", line) for line in message.split("\n")]
    locations = [_location(line, path) for line in lines]
    if len(lines) > 1:  # a title, a line for each fault, and sometimes a fix
        locations = locations[1:] if locations[-1] else locations[1:-1]
    reading.faults = [at for at in locations if at is not None]
    if not locations or None in locations:
        reading.errors.append(f"message without a location: {message[:200]!r}")
    if len(reading.faults) > MAX_FAULTS:
        reading.errors.append(f"{len(reading.faults)} faults are shown")
    reading.errors += [f"message with control characters: {line[:200]!r}" for line in lines if not line.isprintable()]


def _read_report(examples: ExampleSet, path: Path, reading: Reading) -> None:
    report = examples.report
    [source] = report.sources
    report.as_dict()
    reading.skipped = [_location(location, path) for location in source.skipped.locations.get(BAD_RECORD, [])]
    reading.skipped_total = source.skipped.total
    if not source.in_file == source.read == source.kept + source.skipped.total:
        counts = f"{source.in_file} in the file, {source.read} read, {source.kept} kept, {source.skipped.total} skipped"
        reading.errors.append(f"report that does not add up: {counts}")
    if source.samples != len(examples):
        reading.errors.append(f"{source.samples} samples, {len(examples)} examples")
    shown = render_report(report, color=False)
    if any(category(char) in _CONTROLS or bidirectional(char) in _DIRECTIONS for char in shown.replace("\n", "")):
        reading.errors.append("report with control characters")


def examine(case: Case, path: Path, number: int = 0) -> Result:
    """Read a mutated file with bad records refused, then skipped, and compare with the oracle."""
    path.write_bytes(case.data)
    encoder_of(case.chat)
    result, started, peak = Result(number, case.mutation, case.chat), time.process_time(), _peak()
    with (
        patch.object(json_stream, "MAX_RECORD_BYTES", case.limit or json_stream.MAX_RECORD_BYTES),
        patch.object(files, "CHUNK_BYTES", case.chunk or files.CHUNK_BYTES),
        patch.object(parquet, "_BUFFER_BYTES", case.chunk or parquet._BUFFER_BYTES),
        patch.object(parquet, "_BATCH_ROWS", case.chunk or parquet._BATCH_ROWS),
    ):
        readings = [read(path, case.chat, skip_bad) for skip_bad in (False, True)]
    result.seconds = time.process_time() - started
    for reading, mode in zip(readings, ("refusing", "skipping"), strict=True):
        result.findings += [f"{mode}: {error}" for error in reading.errors]
    if result.seconds > MAX_SECONDS:
        result.findings.append(f"takes {result.seconds:.1f} s")
    if peak < _peak() > first_peak() + MAX_MEMORY:
        result.findings.append(f"takes {(_peak() - first_peak()) >> 20} MiB")
    if not any(reading.errors for reading in readings):
        before = [sample for _, sample in expected(row_records(case.original), case.chat)]
        result.outcomes = tuple(_outcome(reading, before) for reading in readings)
        result.findings += _differences(case, readings, before)
    return result


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@cache
def first_peak() -> int:
    encoder_of(QWEN)
    return _peak()


def _outcome(reading: Reading, before: list[Any]) -> str:
    if reading.is_refused:
        return "refused"
    is_same = [sample for _, sample in reading.samples] == before
    return "same" if is_same else "skipped" if reading.skipped_total else "other"


def _differences(case: Case, readings: Sequence[Reading], before: list[Sample | str]) -> Iterator[str]:
    refusing, skipping = readings
    both_refused = refusing.is_refused and skipping.is_refused
    if case.expect is Expect.NO_CRASH or (case.expect is Expect.ORACLE_OR_REFUSED and both_refused):
        return
    if case.rows is not None:
        records, is_refused = row_records(case.rows), False
    else:
        records, is_refused = ([], True) if case.expect is Expect.REFUSED else oracle_records(case.data)
    found: list[str] = []
    wanted = expected(records, case.chat, found)
    yield from found
    bad = [at for at, sample in wanted if sample == BAD]
    if is_refused:
        if not both_refused:
            yield f"is read, but must be refused: {refusing}; {skipping}"
        elif records and not _ends_after(refusing.faults, bad, records[-1].at):
            yield f"refusing gives {refusing}, not faults at {bad} and after {records[-1].at}"
        return
    kept = [(at, sample) for at, sample in wanted if isinstance(sample, Sample)]
    if case.expect is Expect.SAME and [sample for _, sample in wanted] != before:
        yield "must not change the samples, but does"
    if case.expect is Expect.FAULT and not bad:
        yield "has a fault that is not refused"
    if bad and (refusing.faults != bad[:MAX_FAULTS] or refusing.samples):
        yield f"refusing gives {refusing}, not faults at {bad}"
    if not bad:
        yield from _other_samples("refusing", refusing, kept, [])
    yield from _other_samples("skipping", skipping, kept, bad)
    if not skipping.is_refused and skipping.skipped_total != len(wanted) - len(kept):
        yield f"skipping counts {skipping.skipped_total}, not {len(wanted) - len(kept)}"


def _other_samples(mode: str, reading: Reading, kept: Sequence[tuple[At, Sample]], bad: Sequence[At]) -> Iterator[str]:
    locations = [at for at, _ in kept]
    if reading.is_refused or [at for at, _ in reading.samples] != locations or reading.skipped != bad[:100]:
        yield f"{mode} gives {reading}, not {locations} without {bad}"
    else:
        other = [at for (at, sample), (_, wanted) in zip(reading.samples, kept, strict=True) if sample != wanted]
        if other:
            yield f"{mode} gives other samples at {other}"


def _ends_after(faults: Sequence[At], bad: Sequence[At], last: At) -> bool:
    """Return whether faults are those of the bad records, then one that is not before the last record.

    The last record may be part of what cannot be read, and has no fault of its own then.
    """
    expected = [*bad], [at for at in bad if at != last]
    return list(faults[:-1]) in expected and (faults[-1][0] or 0) >= (last[0] or 0)
