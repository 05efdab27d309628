"""Prepared data: the examples and reports of a run in a folder, as tokenising leaves them.

``prepare`` writes such a folder and ``open_prepared`` opens it, in the same process, in another of the same host, or
in a later run. What was logged on the way is part of it and is logged again.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from console import DISK_FULL
from data_utils.dataset import DataReader
from data_utils.examples import ExampleSet, ExampleWriter
from data_utils.report.data_report import DataReport
from data_utils.report.saved import report_from_values, report_values
from data_utils.store import DamagedError
from errors import DataError

logger = logging.getLogger(__name__)

INDEX = "index.json"
_NEW_OBJECTS = 50_000  # between two collections; those of some blocks of records


@dataclass
class Prepared:
    """The sets of a run, open, and the folder that has their files.

    Attributes:
        release: call it when no other process will open the folder; a temporary one is removed then.
    """

    sets: dict[str, ExampleSet]
    folder: Path
    release: Callable[[], None]


def prepare_temporary(reader: DataReader) -> Prepared:
    """Prepare data in a temporary folder.

    Raises:
        DataError: records that cannot be used, or a set without any example.
    """
    folder = Path(tempfile.mkdtemp(prefix="qwen-data-"))
    try:
        with explained_full_disk(folder, "set TMPDIR to use another folder"):
            prepare(reader, folder)
        sets = open_prepared(folder, reader, verify=False)
        report_on(sets)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return Prepared(sets, folder, lambda: shutil.rmtree(folder, ignore_errors=True))


def load_examples(reader: DataReader) -> dict[str, ExampleSet]:
    """Read, check and tokenise all sources, and log a warning for what is skipped or shortened.

    Raises:
        DataError: records that cannot be used, or a set without any example.
    """
    prepared = prepare_temporary(reader)
    prepared.release()  # mapped files stay readable
    return prepared.sets


@contextmanager
def explained_full_disk(folder: Path, fix: str) -> Iterator[None]:
    """Name the folder and the fix in the error of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise OSError(error.errno, error.strerror, f"{folder} ({fix})") from error
        raise


def prepare(reader: DataReader, folder: Path) -> None:
    """Read, check and tokenise all sources, and write them to an empty folder.

    Raises:
        DataError: records that cannot be used.
    """
    writers = {name: ExampleWriter(folder / name) for name in reader.reports}
    with _recorded() as messages, _rare_collections():
        for block in reader.read_blocks():
            for name, writer in writers.items():
                writer.add(block, name)
    sets = {}
    for name, writer in writers.items():
        description = writer.finish()
        digest = ExampleSet(folder / name, description, reader.reports[name], verify=False).digest()
        sets[name] = {**description, "digest": digest, "report": report_values(reader.reports[name])}
    text = json.dumps({"sets": sets, "messages": messages})
    (folder / INDEX).write_text(f"{_checksum(text)}\n{text}\n", encoding="ascii")


def open_prepared(folder: Path, reader: DataReader | None = None, verify: bool = True) -> dict[str, ExampleSet]:
    """Open the sets of a prepared folder. The examples stay readable after it has been removed.

    Args:
        reader: of the same data; its settings are shown in the reports. Without it the reports are empty.
        verify: compare the checksums of all files.

    Raises:
        DamagedError: a file is missing or has been changed.
    """
    sets = {}
    for name, description in _read_index(folder)["sets"].items():
        if reader is None:
            report = DataReport(name)
        else:
            report = report_from_values(name, description["report"], reader.settings, reader.max_samples)
        sets[name] = ExampleSet(folder / name, description, report, verify)
    return sets


def log_again(folder: Path) -> None:
    """Log what was logged while the data of a folder was prepared."""
    for name, level, message in _read_index(folder)["messages"]:
        logging.getLogger(name).log(level, "%s", message)


def report_on(sets: dict[str, ExampleSet]) -> None:
    """Log a warning for what is skipped or shortened.

    Raises:
        DataError: a set without any example.
    """
    for name, examples in sets.items():
        for line in examples.report.warnings():
            logger.warning(line)
        if not len(examples):
            raise _nothing_left(name, examples.report)


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Let the garbage collector look at new objects rarely, and not at what was imported: a tenth of the time."""
    gc.freeze()
    first, *others = gc.get_threshold()
    gc.set_threshold(max(first, _NEW_OBJECTS), *others)
    try:
        yield
    finally:
        gc.set_threshold(first, *others)


@contextmanager
def _recorded() -> Iterator[list[tuple[str, int, str]]]:
    """Collect the name of the logger, the level and the text of each message of this package."""
    messages: list[tuple[str, int, str]] = []

    class Recorder(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append((record.name, record.levelno, record.getMessage()))

    package, recorder = logging.getLogger("data_utils"), Recorder()
    package.addHandler(recorder)
    try:
        yield messages
    finally:
        package.removeHandler(recorder)


def _read_index(folder: Path) -> Any:
    path = folder / INDEX
    try:
        checksum, text, _ = path.read_text(encoding="ascii").split("\n")
    except (OSError, ValueError):
        raise DamagedError(f"{path} is missing or incomplete") from None
    if checksum != _checksum(text):
        raise DamagedError(f"{path} has another checksum than when it was written")
    return json.loads(text)


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _nothing_left(set_name: str, report: DataReport) -> DataError:
    counts: Counter[str] = Counter()
    for source in report.sources:
        counts.update(source.skipped.counts)
    reasons = "; ".join(f"{count} skipped, {reason}" for reason, count in counts.items())
    total, noun = report.total().read, report.total().noun
    purpose = "train" if set_name == "train" else "evaluate"
    names = ", ".join(source.name for source in report.sources)
    if not total:
        what = f"nothing is left to {purpose} on: --eval_split holds out every record"
        return DataError(names, what, "Give more records, or --eval_data_path")
    fix = (
        f"{advice}. Or shorten the conversations"
        if (advice := report.fitting_length())
        else "Give longer texts, or remove their weight"
        if noun == "texts"
        else "Put a user turn before each answer, and use a checkpoint whose prompt does not open a <think> block"
    )
    return DataError(names, f"nothing is left to {purpose} on: {total} {noun} read, {reasons}", fix)
