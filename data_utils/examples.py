"""The examples of a run as a few flat arrays, which the processes of a host can share through files."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from chat.label_mask import labels_from_weights
from data_utils.encode import EncodedConversation, Example
from data_utils.files import Location
from data_utils.report.data_report import DataReport
from data_utils.schema import Conversation

# Columns that define the examples, with their array types: all ids; the runs of ids with the same weight; per example
# its number of ids, the offsets of its first id and its first run, and its number of runs. Copies share ids and runs.
_CONTENT = {
    "ids": "i", "run_lengths": "i", "run_weights": "f", "lengths": "i", "starts": "q", "runs": "q", "run_counts": "i",
}  # fmt: skip
# Origin of each example: index of its path, line, and number of its record (0: unknown).
_PLACES = {"paths": "i", "lines": "q", "records": "q"}
_REST = "examples.json"


class KeptConversation(NamedTuple):
    """A conversation that is used.

    Attributes:
        set_name: ``train`` or ``eval``.
        source: index of its source in the set.
        copies: number of times it is used.
    """

    set_name: str
    source: int
    copies: int
    conversation: Conversation
    encoded: EncodedConversation


class ExampleSet:
    """The examples of a set, as a torch dataset. All ids are in one array, loss weights are runs.

    Attributes:
        source_sizes: number of examples of each source; the examples are in the order of the sources.
        report: what happened to the records; without sources if another process has read them.
        is_weighted: some labels have a weight other than 1.
    """

    def __init__(self, report: DataReport) -> None:
        self.report = report
        self.source_sizes: list[int] = []
        self.is_weighted = False
        # Python arrays, which can grow, while examples are added; numpy arrays, mapped from files, after ``load``.
        self._columns: dict[str, Any] = {name: array(code) for name, code in (_CONTENT | _PLACES).items()}
        self._paths: dict[str, int] = {}

    def add(self, kept: KeptConversation) -> None:
        """Append an example, ``copies`` times."""
        encoded, columns = kept.encoded, self._columns
        start, run = len(columns["ids"]), len(columns["run_lengths"])
        columns["ids"].extend(encoded.input_ids)
        columns["run_lengths"].extend(span.length for span in encoded.spans)
        columns["run_weights"].extend(span.weight for span in encoded.spans)
        self.is_weighted |= any(span.weight not in (0, 1) for span in encoded.spans)
        self.source_sizes.extend([0] * (kept.source + 1 - len(self.source_sizes)))
        self.source_sizes[kept.source] += kept.copies
        where = kept.conversation.where
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
            columns[name].extend([value] * kept.copies)

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each example, for grouping by length."""
        lengths: list[int] = self._columns["lengths"].tolist()
        return lengths

    def __len__(self) -> int:
        return len(self._columns["lengths"])

    def __getitem__(self, index: int) -> Example:
        columns, index = self._columns, range(len(self))[index]
        start, run = int(columns["starts"][index]), int(columns["runs"][index])
        ids: list[int] = columns["ids"][start : start + int(columns["lengths"][index])].tolist()
        runs = slice(run, run + int(columns["run_counts"][index]))
        lengths, weights = columns["run_lengths"][runs].tolist(), columns["run_weights"][runs].tolist()
        labels = labels_from_weights(ids, zip(lengths, weights, strict=True))
        example: Example = {"input_ids": ids, "labels": labels, "index": index}
        if self.is_weighted:
            example["loss_weights"] = np.repeat(weights, lengths).tolist()
        return example

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def where(self, index: int) -> str:
        """Return the place of an example: ``file.jsonl:12`` or ``file.json:40 (record 3)``."""
        path, line, record = (int(self._columns[name][index]) for name in _PLACES)
        return str(Location(list(self._paths)[path], line or None, record or None))

    def digest(self) -> str:
        """Return the SHA-256, 64 hex digits, of the examples in their order, and of the sources' sizes.

        It covers ids, weights and copies, but not the paths of the files.
        """
        digest = hashlib.sha256(json.dumps(self.source_sizes).encode())
        for name in _CONTENT:
            column = self._columns[name]
            digest.update(f" {name} {len(column)} ".encode())
            digest.update(memoryview(column))
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Create a folder and write the examples to it as numpy files and JSON, without their report."""
        folder.mkdir(parents=True)
        for name, column in self._columns.items():
            np.save(folder / f"{name}.npy", np.asarray(column), allow_pickle=False)
        rest = {"source_sizes": self.source_sizes, "is_weighted": self.is_weighted, "paths": list(self._paths)}
        (folder / _REST).write_text(json.dumps(rest), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, report: DataReport) -> ExampleSet:
        """Open the examples of a folder, memory-mapped.

        All processes share its files. The examples stay readable after the folder has been removed.
        """
        examples = cls(report)
        # As plain arrays over the same pages: reading one element of a numpy.memmap is several times slower.
        examples._columns = {
            name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False))
            for name in examples._columns
        }
        rest = json.loads((folder / _REST).read_text(encoding="utf-8"))
        examples.source_sizes, examples.is_weighted = rest["source_sizes"], rest["is_weighted"]
        examples._paths = {path: number for number, path in enumerate(rest["paths"])}
        return examples
