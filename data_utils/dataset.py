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
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_utils.encode import EncodedConversation, Encoder
from data_utils.examples import KeptConversation
from data_utils.files import Location, data_files, read_records
from data_utils.formats import FIELDS, FORMATS, Format, recognise
from data_utils.report.counts import DuplicateIndex
from data_utils.report.data_report import DataReport, ReportSettings
from data_utils.report.samples import build_sample
from data_utils.report.source_report import SourceReport
from data_utils.schema import Conversation
from data_utils.sources import RecordSampler, Source, fill_turns
from errors import DataError, numbered

logger = logging.getLogger(__name__)

_MAX_LISTED_FAULTS = 20
_MAX_LOGGED_FAULTS = 5
_CHECKING_DELAY = 1.0  # seconds
BAD_RECORD = "invalid record"


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
        **run,
    )


@dataclass
class _CheckedSource:
    """Result of the checking pass over a source: its files with their formats, and the number of records."""

    files: list[tuple[Path, Format | None]] = field(default_factory=list)
    usable: int = 0
    bad: int = 0


class DataReader:
    """Reads the sources of a run.

    Args:
        sources: by the name of their set, ``train`` and optionally ``eval``.
        settings: the run's settings for the reports; by default those of the encoder.
        max_samples: maximum number of samples to show in each report.
        show_progress: draw progress bars on stderr.

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
    ) -> None:
        self.encoder = encoder
        self.options = options or DataOptions()
        self.sources = [(set_name, source) for set_name, of_set in sources.items() for source in of_set]
        self.max_samples = max_samples
        self._show_progress = show_progress
        self._faults: list[DataError] = []
        self._placeholders: set[str] = set()
        self._skipped = 0
        self.settings = settings or report_settings(encoder)
        set_names = [*sources, *(["eval"] if self.options.eval_share else [])]
        index = DuplicateIndex()  # shared, to find samples that are both trained and evaluated
        self.reports = {name: DataReport(name, self.settings, max_samples, duplicate_index=index) for name in set_names}

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
            DataError: records that cannot be used, up to 20 of them in one message, or a file that cannot be read.
        """
        files = self.files
        size = sum(path.stat().st_size for path in itertools.chain.from_iterable(files))
        # The bar appears after a delay: if a quick check finds a fault, the fault is all that is printed.
        with self._progress("Checking", size, delay=_CHECKING_DELAY, leave=False) as advance:
            checked = [self._check_source(paths, advance) for paths in files]
        self._raise_faults()
        reason = "" if self.options.data_format == "auto" else " (--data_format)"
        for path, format_ in itertools.chain.from_iterable(source.files for source in checked):
            logger.info("%s: read as %s%s", path, "no known format" if format_ is None else format_.name, reason)
        with self._progress("Tokenising", size) as advance:
            for (set_name, source), checked_source in zip(self.sources, checked, strict=True):
                yield from self._read_source(set_name, source, checked_source, advance)
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

    def _check_source(self, files: Sequence[Path], advance: Callable[[int], object]) -> _CheckedSource:
        checked = _CheckedSource()
        for path in files:
            format_ = None if self.options.data_format == "auto" else FORMATS[self.options.data_format]
            try:
                for where, record in read_records(path, advance, FIELDS):
                    try:
                        if format_ is None and not isinstance(record, DataError):
                            format_ = recognise(record, where)
                        self._parse(record, where, format_)
                    except DataError as error:
                        checked.bad += 1
                        self._add_fault(error)
                    else:
                        checked.usable += 1
                    if len(self._faults) == _MAX_LISTED_FAULTS:
                        return checked
            except DataError as error:  # the rest of the file cannot be read, so this fault cannot be skipped
                self._faults.append(error)
            checked.files.append((path, format_))
        return checked

    def _parse(self, record: object, where: Location, format_: Format | None) -> Conversation:
        if isinstance(record, DataError):
            raise record
        if format_ is None:
            format_ = recognise(record, where)
        conversation = format_.parse(record, where)
        self.encoder.check_conversation(conversation)
        return conversation

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
        self, set_name: str, source: Source, checked: _CheckedSource, advance: Callable[[int], object]
    ) -> Iterator[KeptConversation]:
        eval_share = self.options.eval_share if set_name == "train" else 0.0
        sampler = RecordSampler(source, checked.usable, eval_share, self.options.seed)
        formats = ", ".join(sorted({format_.name for _, format_ in checked.files if format_ is not None}))
        reports = {
            name: self.reports[name].add_source(source.name, formats, checked.usable + checked.bad)
            for name in ({set_name, "eval"} if eval_share else {set_name})
        }
        if source.sample is not None and source.sample > checked.usable:
            logger.warning("%s: only %d records can be drawn", source.name, checked.usable)
        for path, format_ in checked.files:
            for where, record in read_records(path, advance, FIELDS):
                try:
                    conversation = self._parse(record, where, format_)
                except DataError:
                    reports[set_name].skip(where, BAD_RECORD)
                    continue
                train_copies, eval_copies = sampler.next_copies()
                if train_copies or eval_copies:
                    name = "eval" if eval_copies else set_name
                    yield from self._encode(conversation, reports[name], name, train_copies or eval_copies)
                if len(self._faults) == _MAX_LISTED_FAULTS:
                    return

    def _encode(
        self, conversation: Conversation, source_report: SourceReport, set_name: str, copies: int
    ) -> Iterator[KeptConversation]:
        """Encode a checked conversation or plain text and report on it; yield its samples of which any is trained."""
        where, fill = conversation.where, self.options.fill
        turns, placeholders = fill_turns(conversation.turns, fill)
        self._placeholders |= placeholders
        try:
            if placeholders & fill.keys():
                conversation = replace(conversation, turns=turns)
                self.encoder.check_conversation(conversation)  # again, because its texts have changed
            pieces = self.encoder.encode(conversation)
        except DataError as error:
            self._add_fault(error)
            source_report.skip(where, BAD_RECORD, copies)
            return
        if (full_length := pieces[0].full_length) > 0:
            kept_length = len(pieces[0].input_ids) if pieces[0].trained_tokens else 0
            source_report.count_too_long(full_length, kept_length, copies)
        if not pieces[0].trained_tokens:
            source_report.skip(where, self._skip_reason(conversation, pieces[0]), copies)
            return
        report = self.reports[set_name]
        for encoded in pieces:
            is_first = encoded is pieces[0]
            self._report_kept(conversation, encoded, source_report, copies, placeholders - fill.keys(), is_first)
            if report.accepts_samples:
                encoder = self.encoder
                report.add_sample(build_sample(where, source_report.name, encoded, encoder.decode, encoder.control_ids))
            yield KeptConversation(set_name, len(report.sources) - 1, copies, conversation, encoded)

    def _report_kept(
        self,
        conversation: Conversation,
        encoded: EncodedConversation,
        source_report: SourceReport,
        copies: int,
        unfilled: set[str],
        is_first: bool,
    ) -> None:
        truncated = f"longer than --model_max_length {self.encoder.options.max_length}"
        source_report.keep(
            conversation.where,
            encoded,
            copies=copies,
            turns=conversation.turns,
            truncated=truncated if encoded.turns_dropped else None,
            unfilled=unfilled,
            notes=self.encoder.notes(conversation) if is_first else (),
            is_first=is_first,
        )

    def _skip_reason(self, conversation: Conversation, encoded: EncodedConversation) -> str:
        options = self.encoder.options
        if conversation.is_text:
            return "its weight is 0" if conversation.turns[0].weight == 0 else "it has a single token"
        if encoded.turns_dropped:
            if options.truncation == "drop":
                return f"longer than --model_max_length {options.max_length} (--truncation drop)"
            return f"no answer fits within --model_max_length {options.max_length}"
        if any(turn.weight == 0 for turn in conversation.turns if turn.role == "assistant"):
            return "none of its turns is to be trained"
        return f"chat format {self.encoder.family.name!r} has no inference prompt for any of its answers"
