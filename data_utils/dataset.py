"""A data file to the examples of a run, with an account of what was left out."""

from __future__ import annotations

import logging
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from data_utils.encode import EncodedConversation, Encoder, Example
from data_utils.schema import Conversation, parse_conversation, read_records
from errors import DataError, numbered
from qwen_model.chatml import IGNORE_INDEX

logger = logging.getLogger(__name__)

_LOGGED_PLACES = 5
_RECORDED_PLACES = 100
_SHOWN_FAULTS = 20


@dataclass
class DataReport:
    """What became of a data file; ``read == kept + len(skipped)``.

    Attributes:
        read: conversations in the file.
        kept: those that became examples.
        skipped: place and reason of each that did not.
        truncated: places of examples that were shortened.
        tokens: ids of all examples.
        trained_tokens: those of them that are learnt.
    """

    path: str
    read: int = 0
    kept: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    truncated: list[str] = field(default_factory=list)
    tokens: int = 0
    trained_tokens: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For the run's summary in JSON: counts, and the first 100 places of each kind."""
        return {
            "path": self.path,
            "read": self.read,
            "kept": self.kept,
            "skipped": len(self.skipped),
            "truncated": len(self.truncated),
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "skipped_at": [{"where": where, "reason": reason} for where, reason in self.skipped[:_RECORDED_PLACES]],
            "truncated_at": self.truncated[:_RECORDED_PLACES],
        }

    def warnings(self) -> list[str]:
        """A line per kind of loss: how many conversations, why, and the first places."""
        lines = []
        for reason, count in Counter(reason for _, reason in self.skipped).items():
            places = [where for where, its_reason in self.skipped if its_reason == reason]
            lines.append(f"{self.path}: skipped {count} of {self.read} conversations, {reason}: {_first(places)}")
        if self.truncated:
            count = len(self.truncated)
            lines.append(f"{self.path}: shortened {count} of {self.read} conversations: {_first(self.truncated)}")
        return lines

    def lines(self) -> list[str]:
        """The report as short log lines."""
        counts = f"{self.kept} of {self.read} conversations kept, {self.tokens} tokens, {self.trained_tokens} trained"
        return [f"{self.path}: {counts}", *self.warnings()]


class IndexedExample(Example):
    """An example that knows its place in its set."""

    index: int


class ExampleSet:
    """The examples of a file, a dataset for torch: one array for all ids, one byte per id for what is trained.

    Attributes:
        lengths: tokens of each example, for grouping by length.
        report: what became of the file.
    """

    def __init__(
        self,
        input_ids: npt.NDArray[np.int32],
        trained: npt.NDArray[np.bool_],
        lengths: list[int],
        places: list[str],
        report: DataReport,
    ) -> None:
        self.lengths = lengths
        self.report = report
        self._input_ids = input_ids
        self._trained = trained
        self._places = places
        self._ends = np.cumsum(lengths, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> IndexedExample:
        index = range(len(self))[index]
        end = int(self._ends[index])
        span = slice(end - self.lengths[index], end)
        ids = self._input_ids[span]
        labels = np.where(self._trained[span], ids, IGNORE_INDEX).tolist()
        return {"input_ids": ids.tolist(), "labels": labels, "index": index}

    def __iter__(self) -> Iterator[IndexedExample]:
        return (self[index] for index in range(len(self)))

    def where(self, index: int) -> str:
        """The place of an example in its file: ``file.jsonl:12`` or ``file.json:40 (record 3)``."""
        return self._places[index]


def load_examples(path: str | Path, encoder: Encoder, *, show_progress: bool = True) -> ExampleSet:
    """Read, check and encode a data file. What is skipped or shortened is logged as a warning.

    The whole file is read and checked before the first conversation is encoded, so that a fault is found at once.

    Args:
        path: a file as ``data_utils.schema`` describes it.
        show_progress: whether to draw a progress bar on stderr.

    Raises:
        DataError: the records that cannot be used, up to 20 of them, or a file in which nothing is left to train on.
    """
    conversations = _read_conversations(path, needs_answer=encoder.options.needs_answer)
    report = DataReport(str(path), read=len(conversations))
    ids, trained = array("i"), bytearray()
    lengths: list[int] = []
    places: list[str] = []
    progress = tqdm(conversations, f"Tokenising {Path(path).name}", unit=" conversations", disable=not show_progress)
    for conversation in progress:
        encoded = encoder.encode_conversation(conversation)
        trained_tokens = encoded.trained_tokens
        if not trained_tokens:
            report.skipped.append((conversation.where, _skip_reason(encoded, encoder)))
            continue
        if encoded.turns_dropped:
            report.truncated.append(conversation.where)
        report.trained_tokens += trained_tokens
        ids.extend(encoded.input_ids)
        trained.extend(encoded.trained)
        lengths.append(len(encoded.input_ids))
        places.append(conversation.where)
    report.kept, report.tokens = len(lengths), len(ids)
    for line in report.warnings():
        logger.warning(line)
    if not report.kept:
        raise _nothing_left(report)
    return ExampleSet(np.frombuffer(ids, np.int32), np.frombuffer(trained, np.bool_), lengths, places, report)


def _read_conversations(path: str | Path, needs_answer: bool) -> list[Conversation]:
    """All conversations of a file. The original's mask also trains the marks of other turns, so it needs no answer."""
    conversations: list[Conversation] = []
    faults: list[DataError] = []
    try:
        for where, record in read_records(path):
            try:
                conversations.append(parse_conversation(record, where, needs_answer))
            except DataError as error:
                faults.append(error)
                if len(faults) == _SHOWN_FAULTS:
                    break
    except DataError as error:  # behind broken JSON nothing can be read
        faults.append(error)
    if len(faults) == 1:
        raise faults[0]
    if faults:
        count = f"the first {_SHOWN_FAULTS}" if len(faults) == _SHOWN_FAULTS else str(len(faults))
        raise DataError(str(path), numbered(f"{count} faults", faults))
    return conversations


def _skip_reason(encoded: EncodedConversation, encoder: Encoder) -> str:
    if encoded.turns_dropped:
        return f"no answer fits within --model_max_length {encoder.options.max_length}"
    return f"its answers are none that a prompt of the chat format {encoder.family.name!r} can ask for"


def _nothing_left(report: DataReport) -> DataError:
    counts = Counter(reason for _, reason in report.skipped)
    reasons = "; ".join(f"{count} skipped, {reason}" for reason, count in counts.items())
    fix = (
        "Raise --model_max_length, or shorten the conversations"
        if any("--model_max_length" in reason for reason in counts)
        else "Give each answer a user turn before it, and use a checkpoint whose prompts do not open a thought"
    )
    return DataError(report.path, f"nothing is left to train on: {report.read} conversations read, {reasons}", fix)


def _first(places: Sequence[str]) -> str:
    more = ", ..." if len(places) > _LOGGED_PLACES else ""
    return ", ".join(places[:_LOGGED_PLACES]) + more
