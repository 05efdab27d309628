"""Data files to the examples of a run, with an account of what became of every record.

Files are read twice: once to check all records and count them, so that a fault is found before anything is tokenised,
and once to tokenise. Both times they stream, so an account alone (``read_data`` without keeping what it yields) takes
the same memory for any number of records.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_utils.encode import EncodedConversation, Encoder
from data_utils.examples import ExampleSet, KeptConversation
from data_utils.files import Location, data_files, read_records
from data_utils.formats import FORMATS, Format, recognise
from data_utils.report.counts import DuplicateIndex
from data_utils.report.data_report import DataReport, ReportSettings
from data_utils.report.samples import build_sample
from data_utils.report.source_report import SourceReport
from data_utils.schema import Conversation
from data_utils.sources import RecordSampler, Source, fill_turns
from errors import DataError, numbered

__all__ = ["BAD_RECORD", "DataOptions", "DataReader", "ExampleSet", "KeptConversation", "load_examples"]

logger = logging.getLogger(__name__)

_SHOWN_FAULTS = 20
_LOGGED_FAULTS = 5
_CHECKING_DELAY = 1.0  # seconds
BAD_RECORD = "bad record"


@dataclass(frozen=True)
class DataOptions:
    """How sources are read.

    Attributes:
        data_format: a name of ``FORMATS``; ``auto`` recognises it, file by file.
        fill: texts for ``{{name}}`` in messages.
        skip_bad: leave out records that cannot be used, instead of refusing the data.
        eval_share: share of the training sources that is held out for evaluation.
        seed: of what is drawn and held out.
    """

    data_format: str = "auto"
    fill: Mapping[str, str] = field(default_factory=dict)
    skip_bad: bool = False
    eval_share: float = 0.0
    seed: int = 42


@dataclass
class _Survey:
    """What the first reading of a source found: its files with their formats, how many records can be used or not."""

    files: list[tuple[Path, Format | None]] = field(default_factory=list)
    usable: int = 0
    bad: int = 0


class DataReader:
    """Reads the sources of a run.

    Args:
        sources: by the name of their set, ``train`` and perhaps ``eval``.
        encoder: of this run's tokenizer.
        settings: what of the run the accounts tell; from the encoder where not given.
        max_samples: how many samples of each set its account keeps to show.
        show_progress: whether to draw progress bars on stderr.

    Attributes:
        reports: the account of each set, complete when ``read`` has come to its end.
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
        self._sources = {name: list(each) for name, each in sources.items()}
        self._show_progress = show_progress
        self._faults: list[DataError] = []
        self._placeholders: set[str] = set()
        self._left_out = 0
        names = [*self._sources, *(["eval"] if self.options.eval_share else [])]
        settings = settings or ReportSettings(
            family=encoder.family.name,
            label_mask=encoder.options.label_mask,
            truncation=encoder.options.truncation,
            model_max_length=encoder.options.max_length,
        )
        index = DuplicateIndex()  # of all sets, so that it also finds samples that are both trained and evaluated
        self.reports = {name: DataReport(name, settings, max_samples, duplicate_index=index) for name in names}

    def read(self) -> Iterator[KeptConversation]:
        """Check everything, then yield what is used, source by source.

        Raises:
            DataError: the records that cannot be used, up to 20 of them at once, and a file that cannot be read.
        """
        flat = [(name, source, data_files(source.path)) for name, each in self._sources.items() for source in each]
        size = sum(path.stat().st_size for _, _, files in flat for path in files)
        # What is checked in a moment needs no bar, so that a fault found there is all that is said.
        with self._progress("Checking", size, delay=_CHECKING_DELAY, leave=False) as advance:
            surveys = [self._survey(files, advance) for _, _, files in flat]
        self._raise_faults()
        given = "" if self.options.data_format == "auto" else ", as --data_format says"
        for path, format_ in itertools.chain.from_iterable(survey.files for survey in surveys):
            logger.info("%s: read as %s%s", path, "no known format" if format_ is None else format_.name, given)
        with self._progress("Tokenising", size) as advance:
            for (name, source, _), survey in zip(flat, surveys, strict=True):
                yield from self._read_source(name, source, survey, advance)
        self._raise_faults()
        for report in self.reports.values():
            report.close()
        for name in self.options.fill.keys() - self._placeholders:
            logger.warning("--fill %s: no message that was read holds {{%s}}", name, name)

    @contextmanager
    def _progress(self, what: str, size: int, **style: Any) -> Iterator[Callable[[int], object]]:
        hidden = not self._show_progress
        with tqdm(total=size, desc=what, unit="B", unit_scale=True, disable=hidden, **style) as bar:
            yield bar.update

    # First reading

    def _survey(self, files: Sequence[Path], advance: Callable[[int], object]) -> _Survey:
        survey = _Survey()
        for path in files:
            format_ = None if self.options.data_format == "auto" else FORMATS[self.options.data_format]
            try:
                for where, record in read_records(path, advance):
                    try:
                        if format_ is None and not isinstance(record, DataError):
                            format_ = recognise(record, where)
                        self._parse(record, where, format_)
                    except DataError as error:
                        survey.bad += 1
                        self._note_fault(error)
                    else:
                        survey.usable += 1
                    if len(self._faults) == _SHOWN_FAULTS:
                        return survey
            except DataError as error:  # nothing behind it can be read, so it cannot be left out alone
                self._faults.append(error)
            survey.files.append((path, format_))
        return survey

    def _parse(self, record: object, where: Location, format_: Format | None) -> Conversation:
        if isinstance(record, DataError):
            raise record
        if format_ is None:
            format_ = recognise(record, where)
        conversation = format_.parse(record, where)
        self.encoder.check_conversation(conversation)
        return conversation

    def _note_fault(self, error: DataError) -> None:
        """Keep it for the list of faults; or say what is left out, the first few times."""
        if not self.options.skip_bad:
            self._faults.append(error)
            return
        self._left_out += 1
        if self._left_out <= _LOGGED_FAULTS:
            logger.warning("Left out: %s", error)

    def _raise_faults(self) -> None:
        faults = self._faults[:_SHOWN_FAULTS]
        if len(faults) == 1:
            raise faults[0]
        if faults:
            count = f"the first {len(faults)} faults" if len(faults) == _SHOWN_FAULTS else f"{len(faults)} faults"
            fix = "" if self.options.skip_bad else "\n  --on_bad_record skip leaves such records out"
            raise DataError("--data_path", numbered(count, faults) + fix)

    # Second reading

    def _read_source(
        self, set_name: str, source: Source, survey: _Survey, advance: Callable[[int], object]
    ) -> Iterator[KeptConversation]:
        held = self.options.eval_share if set_name == "train" else 0.0
        draw = RecordSampler(source, survey.usable, held, self.options.seed)
        formats = ", ".join(sorted({format_.name for _, format_ in survey.files if format_ is not None}))
        reports = {
            name: self.reports[name].add_source(source.name, formats, survey.usable + survey.bad)
            for name in ({set_name, "eval"} if held else {set_name})
        }
        if source.sample is not None and source.sample > survey.usable:
            logger.warning("%s: only %d records can be drawn", source.name, survey.usable)
        for path, format_ in survey.files:
            for where, record in read_records(path, advance):
                try:
                    conversation = self._parse(record, where, format_)
                except DataError:
                    reports[set_name].skip(where, BAD_RECORD)
                    continue
                trained, evaluated = draw.take()
                if trained or evaluated:
                    name = "eval" if evaluated else set_name
                    yield from self._encode(conversation, reports[name], name, trained or evaluated)
                if len(self._faults) == _SHOWN_FAULTS:
                    return

    def _encode(
        self, conversation: Conversation, source_report: SourceReport, set_name: str, copies: int
    ) -> Iterator[KeptConversation]:
        turns, placeholders = fill_turns(conversation.turns, self.options.fill)
        self._placeholders |= placeholders
        conversation = replace(conversation, turns=turns)
        where = conversation.where
        try:
            encoded = self.encoder.encode_conversation(conversation)
        except DataError as error:
            self._note_fault(error)
            source_report.skip(where, BAD_RECORD, copies)
            return
        if not encoded.trained_tokens:
            source_report.skip(where, self._skip_reason(conversation, encoded), copies)
            return
        truncated = f"longer than --model_max_length {self.encoder.options.max_length}"
        source_report.keep(
            where,
            encoded,
            copies=copies,
            turns=turns,
            truncated=truncated if encoded.turns_dropped else None,
            unfilled=placeholders - self.options.fill.keys(),
        )
        report = self.reports[set_name]
        if report.accepts_samples:
            encoder = self.encoder
            report.add_sample(build_sample(where, source_report.name, encoded, encoder.decode, encoder.control_ids))
        yield KeptConversation(set_name, len(report.sources) - 1, copies, conversation, encoded)

    def _skip_reason(self, conversation: Conversation, encoded: EncodedConversation) -> str:
        options = self.encoder.options
        if encoded.turns_dropped:
            if options.truncation == "drop":
                return f"longer than --model_max_length {options.max_length} (--truncation drop)"
            return f"no answer fits within --model_max_length {options.max_length}"
        if any(turn.weight == 0 for turn in conversation.turns if turn.role == "assistant"):
            return "none of its turns is to be trained"
        return f"its answers are none that a prompt of the chat format {self.encoder.family.name!r} can ask for"


def load_examples(reader: DataReader) -> dict[str, ExampleSet]:
    """Read, check and tokenise all sources. What is skipped or shortened is logged as a warning.

    Raises:
        DataError: records that cannot be used, or a set in which nothing is left.
    """
    sets = {name: ExampleSet(report) for name, report in reader.reports.items()}
    for taken in reader.read():
        sets[taken.set_name].add(taken)
    for name, examples in sets.items():
        for line in examples.report.warnings():
            logger.warning(line)
        if not len(examples):
            raise _nothing_left(name, examples.report)
    return sets


def _nothing_left(name: str, report: DataReport) -> DataError:
    counts: Counter[str] = Counter()
    for source in report.sources:
        counts.update(source.skipped.counts)
    reasons = "; ".join(f"{count} skipped, {reason}" for reason, count in counts.items())
    read = sum(source.read for source in report.sources)
    fix = (
        "Raise --model_max_length, or shorten the conversations"
        if any("--model_max_length" in reason for reason in counts)
        else "Give each answer a user turn before it, and use a checkpoint whose prompts do not open a thought"
    )
    what = "train" if name == "train" else "evaluate"
    names = ", ".join(source.name for source in report.sources)
    return DataError(names, f"nothing is left to {what} on: {read} conversations read, {reasons}", fix)
