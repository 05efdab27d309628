"""Data files to the examples of a run, with a report on what happened to every record.

The files are read twice. The checking pass reads, checks and counts all records, so that faults are found before
anything is tokenised; the second pass tokenises. Both stream the files: memory does not grow with them unless the
caller keeps what ``DataReader.read`` yields.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_utils.blocks import EncodedBlock, KeptConversation, Record, Records
from data_utils.encode import Encoder
from data_utils.files import data_files, read_records
from data_utils.formats import FIELDS, FORMATS, Format, recognise
from data_utils.json_stream import JsonLine
from data_utils.records import RecordEncoder
from data_utils.report.counts import DuplicateIndex
from data_utils.report.data_report import DataReport, ReportSettings
from data_utils.report.samples import build_sample
from data_utils.report.source_report import SourceReport
from data_utils.sources import RecordSampler, Source
from data_utils.workers import Workers
from errors import DataError, numbered

logger = logging.getLogger(__name__)

_MAX_LISTED_FAULTS = 20
_MAX_LOGGED_FAULTS = 5
_CHECKING_DELAY = 1.0  # seconds
# Of a block of records, which a process checks or tokenises.
_BLOCK_RECORDS, _BLOCK_BYTES = 512, 1 << 20
# Of data that is certainly worth the time of ``Encoder.prepare_for_many``.
_MANY_BYTES = 4 << 20


@dataclass(frozen=True)
class DataOptions:
    """Options for reading sources.

    Attributes:
        data_format: a name in ``FORMATS``, or ``auto`` to recognise it file by file.
        fill: replacements for ``{{name}}`` in messages.
        skip_bad: skip records that cannot be used, instead of refusing the data.
        eval_share: share of the training sources that is held out for evaluation.
        seed: of the draws and of the held-out share.
    """

    data_format: str = "auto"
    fill: Mapping[str, str] = field(default_factory=dict)
    skip_bad: bool = False
    eval_share: float = 0.0
    seed: int = 42


def report_settings(encoder: Encoder, **run: Any) -> ReportSettings:
    """Return the settings that a report shows: the encoder's, and those of the run as keywords."""
    return ReportSettings(
        family=encoder.family.name,
        label_mask=encoder.options.label_mask,
        truncation=encoder.options.truncation,
        model_max_length=encoder.options.max_length,
        thinking=encoder.options.thinking,
        split_turns=encoder.options.split_turns,
        has_switch=encoder.rules.has_switch,
        **run,
    )


@dataclass
class _CheckedFile:
    """Result of the checking pass over a file.

    Attributes:
        usable: for each record, whether it can be used.
        fault: why nothing after these records can be read.
        is_text: the user says that it is plain text.
    """

    path: Path
    format: Format | None
    usable: bytearray = field(default_factory=bytearray)
    fault: DataError | None = None
    is_text: bool = False

    @property
    def format_name(self) -> str | None:
        return None if self.format is None else self.format.name


class DataReader:
    """Reads the sources of a run.

    Args:
        sources: by the name of their set, ``train`` and optionally ``eval``.
        settings: the run's settings for the reports; by default those of the encoder.
        max_samples: maximum number of samples to show in each report.
        show_progress: draw progress bars on stderr.
        processes: number of processes that check and tokenise. The result is always the same.
        names_formats: log as what each file is read.

    Attributes:
        reports: the report of each set, complete when ``read`` is exhausted.
        settings: those that the reports show.
    """

    def __init__(
        self,
        sources: Mapping[str, Sequence[Source]],
        encoder: Encoder,
        options: DataOptions | None = None,
        settings: ReportSettings | None = None,
        *,
        max_samples: int = 0,
        show_progress: bool = True,
        processes: int = 1,
        names_formats: bool = True,
    ) -> None:
        self.encoder = encoder
        self.options = options or DataOptions()
        self.sources = [(set_name, source) for set_name, of_set in sources.items() for source in of_set]
        self.max_samples = max_samples
        self._show_progress, self._processes, self._names_formats = show_progress, processes, names_formats
        self._faults: list[DataError] = []
        self._placeholders: set[str] = set()
        self._skipped = 0
        self.settings = settings or report_settings(encoder)
        set_names = [*sources, *(["eval"] if self.options.eval_share else [])]
        self._duplicates = DuplicateIndex()  # shared, to find samples that are both trained and evaluated
        self.reports = {
            name: DataReport(name, self.settings, max_samples, duplicate_index=self._duplicates) for name in set_names
        }

    @cached_property
    def files(self) -> list[list[Path]]:
        """The data files of each source.

        Raises:
            DataError: a source without any, or one that cannot be read.
        """
        return [data_files(source.path) for _, source in self.sources]

    def read(self) -> Iterator[KeptConversation]:
        """Check all records, then yield the conversations that are used, source by source.

        Raises:
            DataError: see ``read_blocks``.
        """
        for block in self.read_blocks():
            yield from block.conversations()

    def read_blocks(self) -> Iterator[EncodedBlock]:
        """Check all records, then yield the conversations that are used as blocks, each of one file.

        Raises:
            DataError: records that cannot be used, up to 20 of them in one message, or a file that cannot be read.
        """
        files = self.files
        size = sum(path.stat().st_size for path in itertools.chain.from_iterable(files))
        if self._processes > 1 or size > _MANY_BYTES:
            self.encoder.prepare_for_many()  # before the processes are forked
        encoder = RecordEncoder(self.encoder, self.options.fill, self.options.data_format != "auto")
        with Workers(encoder, self._processes) as workers:
            # The bar appears after a delay: if a quick check finds a fault, the fault is all that is printed.
            with self._progress("Checking", size, delay=_CHECKING_DELAY, leave=False) as advance:
                checked = [self._check_source(paths, advance, workers) for paths in files]
            self._raise_faults()
            reason = "" if self.options.data_format == "auto" else " (--data_format)"
            for file in itertools.chain.from_iterable(checked) if self._names_formats else ():
                logger.info("%s: read as %s%s", file.path, file.format_name or "no known format", reason)
            with self._progress("Tokenising", size) as advance:
                for (set_name, source), of_source in zip(self.sources, checked, strict=True):
                    yield from self._read_source(set_name, source, of_source, advance, workers)
        self._raise_faults()
        for report in self.reports.values():
            report.close()
        for name in self.options.fill.keys() - self._placeholders:
            logger.warning("--fill %s: no message contains {{%s}}", name, name)

    @contextmanager
    def _progress(self, label: str, size: int, **style: Any) -> Iterator[Callable[[int], object]]:
        hidden = None if self._show_progress else True  # None: unless stderr is a terminal
        with tqdm(total=size, desc=label, unit="B", unit_scale=True, disable=hidden, **style) as bar:
            yield bar.update

    # Checking pass

    def _check_source(
        self, paths: Sequence[Path], advance: Callable[[int], object], workers: Workers
    ) -> list[_CheckedFile]:
        checked: list[_CheckedFile] = []
        for path in paths:
            name = self.options.data_format
            file = _CheckedFile(path, None if name == "auto" else FORMATS[name], is_text=name == "text")
            for usable, faults in workers.map("check", _blocks_to_check(file, advance)):
                file.usable += usable
                for fault in faults:
                    self._add_fault(fault)
                if len(self._faults) >= _MAX_LISTED_FAULTS:
                    return checked
            if file.fault is not None:  # the rest of the file cannot be read, so this fault cannot be skipped
                self._faults.append(file.fault)
            checked.append(file)
        return checked

    def _add_fault(self, error: DataError) -> None:
        """Add a fault to those that are raised, or with ``skip_bad`` count it and log the first few."""
        if not self.options.skip_bad:
            self._faults.append(error)
            return
        self._skipped += 1
        if self._skipped <= _MAX_LOGGED_FAULTS:
            logger.warning("Skipped: %s", error)

    def _raise_faults(self) -> None:
        faults = self._faults[:_MAX_LISTED_FAULTS]
        if len(faults) == 1:
            raise faults[0]
        if faults:
            is_full = len(faults) == _MAX_LISTED_FAULTS
            count = f"the first {len(faults)} faults" if is_full else f"{len(faults)} faults"
            fix = "" if self.options.skip_bad else "\n  --on_bad_record skip leaves such records out"
            raise DataError("--data_path", numbered(count, faults) + fix)

    # Second pass

    def _read_source(
        self,
        set_name: str,
        source: Source,
        files: Sequence[_CheckedFile],
        advance: Callable[[int], object],
        workers: Workers,
    ) -> Iterator[EncodedBlock]:
        eval_share = self.options.eval_share if set_name == "train" else 0.0
        usable, total = sum(sum(file.usable) for file in files), sum(len(file.usable) for file in files)
        sampler = RecordSampler(source, usable, eval_share, self.options.seed)
        formats = ", ".join(sorted({file.format.name for file in files if file.format is not None}))
        reports = {
            name: self.reports[name].add_source(source.name, formats, total)
            for name in ({set_name, "eval"} if eval_share else {set_name})
        }
        if source.sample is not None and source.sample > usable:
            logger.warning("%s: only %d records can be drawn", source.name, usable)
        for file in files:
            for block in workers.map("encode", _blocks_to_encode(file, sampler, set_name, advance)):
                self._report(block, reports)
                yield block
                if len(self._faults) >= _MAX_LISTED_FAULTS:
                    return

    def _report(self, block: EncodedBlock, source_reports: dict[str, SourceReport]) -> None:
        """Report on a block of the source that is last in the report of each set."""
        self._placeholders |= block.placeholders
        for fault in block.faults:
            self._add_fault(fault)
        for set_name, part in block.reports.items():
            source_reports[set_name] += part
        originals = self._duplicates.add(block.digests, block.locations)
        for set_name, where, original in zip(block.set_names, block.locations, originals, strict=True):
            source_reports[set_name].count_copy(where, original)
        block.sources = {set_name: len(self.reports[set_name].sources) - 1 for set_name in source_reports}
        if any(self.reports[set_name].accepts_samples for set_name in set(block.set_names)):
            self._add_samples(block)

    def _add_samples(self, block: EncodedBlock) -> None:
        decode, control_ids = self.encoder.decode, self.encoder.control_ids
        for kept in block.conversations():
            report = self.reports[kept.set_name]
            if report.accepts(str(kept.where)):
                source = report.sources[kept.source].name
                report.add_sample(build_sample(kept.where, source, kept.encoded, decode, control_ids))


def _blocks_to_check(file: _CheckedFile, advance: Callable[[int], object]) -> Iterator[tuple[str | None, Records]]:
    """Yield the records of a file in blocks, with the name of their format, and complete what is known of the file."""
    records = Records()
    size = 0
    try:
        for record in read_records(file.path, advance, FIELDS, parses_lines=False, is_text=file.is_text):
            if file.format is None and (found := _recognised(record)) is not None:
                if records:  # none of them has a known format
                    yield None, records
                records, size, file.format = Records(), 0, found
            records.append(record)
            size += _size_of(record[1])
            if len(records) == _BLOCK_RECORDS or size >= _BLOCK_BYTES:
                yield file.format_name, records
                records, size = Records(), 0
    except DataError as error:
        file.fault = error
    if records:
        yield file.format_name, records


def _blocks_to_encode(
    file: _CheckedFile, sampler: RecordSampler, set_name: str, advance: Callable[[int], object]
) -> Iterator[tuple[str | None, Records, list[str], list[int]]]:
    """Yield the records of a file in blocks, for ``RecordEncoder.encode``: those that are used or cannot be used."""
    records, set_names, copies = Records(), list[str](), list[int]()
    size = 0
    for record, is_usable in zip(
        read_records(file.path, advance, FIELDS, parses_lines=False, is_text=file.is_text), file.usable, strict=False
    ):
        train_copies, eval_copies = sampler.next_copies() if is_usable else (0, 0)
        if is_usable and not (train_copies or eval_copies):
            continue  # not drawn
        records.append(record)
        set_names.append("eval" if eval_copies else set_name)
        copies.append(train_copies or eval_copies)
        size += _size_of(record[1])
        if len(records) == _BLOCK_RECORDS or size >= _BLOCK_BYTES:
            yield file.format_name, records, set_names, copies
            records, set_names, copies = Records(), [], []
            size = 0
    if records:
        yield file.format_name, records, set_names, copies


def _recognised(record: Record) -> Format | None:
    """Return the format of a record, if it has a known one."""
    where, value = record
    value = value.parse() if isinstance(value, JsonLine) else value
    try:
        return None if isinstance(value, DataError) else recognise(value, where)
    except DataError:
        return None


def _size_of(value: object) -> int:
    """Return the characters of the texts in a record."""
    if isinstance(value, JsonLine):
        return len(value.text)
    if isinstance(value, str):
        return len(value)
    if isinstance(value, (dict, list)):
        return sum(map(_size_of, value.values() if isinstance(value, dict) else value))
    return 0
