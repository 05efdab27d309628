"""The examples of a run as a few flat columns in files, which the processes of a host share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from chat.label_mask import labels_from_weights
from data_utils.encode import EncodedConversation, Example
from data_utils.files import Location
from data_utils.report.data_report import DataReport
from data_utils.store import ColumnWriter, open_columns

# Columns that define the examples, with their array types: all ids; the runs of ids with the same weight; per example
# its number of ids, the offsets of its first id and its first run, and its number of runs. Copies share ids and runs.
_CONTENT = {
    "ids": "i", "run_lengths": "i", "run_weights": "f", "lengths": "i", "starts": "q", "runs": "q", "run_counts": "i",
}  # fmt: skip
# Origin of each example: index of its path, line, and number of its record (0: unknown).
_PLACES = {"paths": "i", "lines": "q", "records": "q"}
_FLUSHED_ITEMS = 1 << 18
_PLAIN_WEIGHTS = frozenset({0.0, 1.0})


class KeptConversation(NamedTuple):
    """A conversation that is used.

    Attributes:
        set_name: ``train`` or ``eval``.
        source: index of its source in the set.
        copies: number of times it is used.
        where: the location of its record.
        is_text: it is a piece of a plain text.
    """

    set_name: str
    source: int
    copies: int
    where: Location | str
    is_text: bool
    encoded: EncodedConversation


class ExampleWriter:
    """Writes the examples of a set to the files of a new folder, while they are added."""

    def __init__(self, folder: Path) -> None:
        self._columns = ColumnWriter(folder, _CONTENT | _PLACES)
        self._paths: dict[str, int] = {}
        self._source_sizes: list[int] = []
        self._is_weighted = self._has_text = False

    def add(self, kept: KeptConversation) -> None:
        """Append an example, ``copies`` times."""
        encoded, writer = kept.encoded, self._columns
        columns, start, run = writer.buffers, writer.count("ids"), writer.count("run_lengths")
        columns["ids"].extend(encoded.input_ids)
        weights = [span.weight for span in encoded.spans]
        columns["run_lengths"].extend([span.length for span in encoded.spans])
        columns["run_weights"].extend(weights)
        self._is_weighted |= not _PLAIN_WEIGHTS.issuperset(weights)
        self._has_text |= kept.is_text
        self._source_sizes.extend([0] * (kept.source + 1 - len(self._source_sizes)))
        self._source_sizes[kept.source] += kept.copies
        where = kept.where
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
        if max(len(columns["ids"]), len(columns["lengths"])) >= _FLUSHED_ITEMS:
            writer.flush()

    def finish(self) -> dict[str, Any]:
        """Complete the files, and return what ``ExampleSet`` needs beside them; JSON can represent it."""
        return {
            "columns": self._columns.close(),
            "source_sizes": self._source_sizes,
            "is_weighted": self._is_weighted,
            "has_text": self._has_text,
            "paths": list(self._paths),
        }


class ExampleSet:
    """The examples of a set, as a torch dataset over memory-mapped files, which all processes of a host share.

    All ids are in one array, loss weights are runs. The examples stay readable after the folder has been removed.

    Args:
        folder: where an ``ExampleWriter`` has written.
        description: what it has returned, and optionally their ``digest``.
        report: what happened to the records; without sources if another process has read them.
        verify: compare the checksums of the files.

    Attributes:
        source_sizes: number of examples of each source; the examples are in the order of the sources.
        is_weighted: some labels have a weight other than 1.
        has_text: some examples are plain text.

    Raises:
        DamagedError: a file is not as it was written.
    """

    def __init__(self, folder: Path, description: Mapping[str, Any], report: DataReport, verify: bool = True) -> None:
        self.report = report
        self.source_sizes: list[int] = description["source_sizes"]
        self.is_weighted: bool = description["is_weighted"]
        self.has_text: bool = description["has_text"]
        self._paths: list[str] = description["paths"]
        self._digest: str | None = description.get("digest")
        self._columns = open_columns(folder, description["columns"], verify)

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
        return str(Location(self._paths[path], line or None, record or None))

    def digest(self) -> str:
        """Return the SHA-256, 64 hex digits, of the examples in their order, and of the sources' sizes.

        It covers ids, weights and copies, but not the paths of the files.
        """
        if self._digest is None:
            digest = hashlib.sha256(json.dumps(self.source_sizes).encode())
            for name in _CONTENT:
                column = self._columns[name]
                digest.update(f" {name} {len(column)} ".encode())
                digest.update(memoryview(column))
            self._digest = digest.hexdigest()
        return self._digest
