"""The examples of a run as a few flat arrays, which processes of a host can share through files."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from chat.label_mask import IGNORE_INDEX
from data_utils.encode import EncodedConversation, Example
from data_utils.files import Location
from data_utils.report.data_report import DataReport
from data_utils.schema import Conversation

# What makes examples the same ones, by their types: all ids; runs of ids with the same weight; for each example its
# length and where its ids and its runs begin (copies share theirs).
_CONTENT = {
    "ids": "i", "run_lengths": "i", "run_weights": "f", "lengths": "i", "starts": "q", "runs": "q", "run_counts": "i",
}  # fmt: skip
# Where each example comes from: which of the paths, which line and which record of it (0: not known).
_PLACES = {"paths": "i", "lines": "q", "records": "q"}
_REST = "examples.json"


class KeptConversation(NamedTuple):
    """A conversation that is used: in which set (``train`` or ``eval``), of which source, and how many times."""

    set_name: str
    source: int
    copies: int
    conversation: Conversation
    encoded: EncodedConversation


class ExampleSet:
    """The examples of a set, a dataset for torch: one array for all ids, and runs of ids with the same weight.

    Attributes:
        source_sizes: how many examples each source has; they stand in this order.
        report: what became of the records; without sources where another process has read them.
        is_weighted: whether some labels count more than others.
    """

    def __init__(self, report: DataReport) -> None:
        self.report = report
        self.source_sizes: list[int] = []
        self.is_weighted = False
        # Arrays that grow while examples are added; of numpy, mapped from files, where they were loaded.
        self._columns: dict[str, Any] = {name: array(code) for name, code in (_CONTENT | _PLACES).items()}
        self._paths: dict[str, int] = {}

    def add(self, taken: KeptConversation) -> None:
        """Append an example, ``copies`` times."""
        encoded, columns = taken.encoded, self._columns
        start, run = len(columns["ids"]), len(columns["run_lengths"])
        columns["ids"].extend(encoded.input_ids)
        columns["run_lengths"].extend(span.length for span in encoded.spans)
        columns["run_weights"].extend(span.weight for span in encoded.spans)
        self.is_weighted |= any(span.weight not in (0, 1) for span in encoded.spans)
        self.source_sizes.extend([0] * (taken.source + 1 - len(self.source_sizes)))
        self.source_sizes[taken.source] += taken.copies
        where = taken.conversation.where
        place = where if isinstance(where, Location) else Location(where)
        example = {
            "lengths": len(encoded.input_ids),
            "starts": start,
            "runs": run,
            "run_counts": len(encoded.spans),
            "paths": self._paths.setdefault(place.path, len(self._paths)),
            "lines": place.line or 0,
            "records": place.record or 0,
        }
        for name, value in example.items():
            columns[name].extend([value] * taken.copies)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example, for grouping by length."""
        lengths: list[int] = self._columns["lengths"].tolist()
        return lengths

    def __len__(self) -> int:
        return len(self._columns["lengths"])

    def __getitem__(self, index: int) -> Example:
        columns, index = self._columns, range(len(self))[index]
        start, run = int(columns["starts"][index]), int(columns["runs"][index])
        ids = columns["ids"][start : start + int(columns["lengths"][index])].tolist()
        runs = slice(run, run + int(columns["run_counts"][index]))
        weights = np.repeat(np.array(columns["run_weights"][runs]), np.array(columns["run_lengths"][runs]))
        example: Example = {
            "input_ids": ids,
            "labels": np.where(weights > 0, ids, IGNORE_INDEX).tolist(),
            "index": index,
        }
        if self.is_weighted:
            example["loss_weights"] = weights.tolist()
        return example

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def where(self, index: int) -> str:
        """The place of an example in its file: ``file.jsonl:12`` or ``file.json:40 (record 3)``."""
        path, line, record = (int(self._columns[name][index]) for name in _PLACES)
        return str(Location(list(self._paths)[path], line or None, record or None))

    def digest(self) -> str:
        """SHA-256 of what is trained, and in which order: ids, their weights, copies, the sources' sizes.

        Where the files lie does not matter.

        Returns:
            64 hex digits.
        """
        digest = hashlib.sha256(json.dumps(self.source_sizes).encode())
        for name in _CONTENT:
            column = self._columns[name]
            digest.update(f" {name} {len(column)} ".encode())
            digest.update(memoryview(column))
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Write the examples to a folder that is made, without their report: numpy's files, and JSON."""
        folder.mkdir(parents=True)
        for name, column in self._columns.items():
            np.save(folder / f"{name}.npy", np.asarray(column), allow_pickle=False)
        rest = {"source_sizes": self.source_sizes, "is_weighted": self.is_weighted, "paths": list(self._paths)}
        (folder / _REST).write_text(json.dumps(rest), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, report: DataReport) -> ExampleSet:
        """Open the examples of a folder.

        They stay in its files, which all processes share, and are readable after the folder has been removed.
        """
        examples = cls(report)
        # A plain array over the same pages: taking one number of numpy's memmap costs several times as much.
        examples._columns = {
            name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False))
            for name in examples._columns
        }
        rest = json.loads((folder / _REST).read_text(encoding="utf-8"))
        examples.source_sizes, examples.is_weighted = rest["source_sizes"], rest["is_weighted"]
        examples._paths = {path: number for number, path in enumerate(rest["paths"])}
        return examples
