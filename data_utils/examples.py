"""The examples of a run as a few flat columns in files, which the processes of a host share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from chat.label_mask import labels_from_weights
from data_utils.blocks import EncodedBlock
from data_utils.encode import Example
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


class ExampleWriter:
    """Writes the examples of a set to the files of a new folder, while they are added."""

    def __init__(self, folder: Path) -> None:
        self._columns = ColumnWriter(folder, _CONTENT | _PLACES)
        self._paths: dict[str, int] = {}
        self._source_sizes: list[int] = []
        self._is_weighted = self._has_text = False

    def add(self, block: EncodedBlock, set_name: str) -> None:
        """Append the examples of a block that belong to a set, each as often as it is used."""
        chosen = np.array([name == set_name for name in block.set_names], bool)
        if not chosen.any():
            return
        writer, all_lengths, all_counts = self._columns, np.asarray(block.lengths), np.asarray(block.run_counts)
        runs = np.repeat(chosen, all_counts)
        weights = np.asarray(block.run_weights)[runs]
        copies, lengths, counts = np.asarray(block.copies)[chosen], all_lengths[chosen], all_counts[chosen]
        per_example = {
            "lengths": lengths,
            "starts": writer.count("ids") + lengths.cumsum() - lengths,
            "runs": writer.count("run_lengths") + counts.cumsum() - counts,
            "run_counts": counts,
            "paths": np.full(len(copies), self._paths.setdefault(block.path, len(self._paths))),
            "lines": np.array(block.lines)[chosen],
            "records": np.array(block.records)[chosen],
        }
        columns = {name: np.repeat(values, copies) for name, values in per_example.items()}
        columns["ids"] = np.asarray(block.ids)[np.repeat(chosen, all_lengths)]
        columns["run_lengths"], columns["run_weights"] = np.asarray(block.run_lengths)[runs], weights
        for name, buffer in writer.buffers.items():
            buffer.frombytes(columns[name].astype(buffer.typecode).tobytes())
        self._is_weighted |= bool(((weights != 0) & (weights != 1)).any())
        self._has_text |= block.is_text
        source = block.sources[set_name]
        self._source_sizes.extend([0] * (source + 1 - len(self._source_sizes)))
        self._source_sizes[source] += int(copies.sum())
        if max(len(writer.buffers[name]) for name in ("ids", "lengths")) >= _FLUSHED_ITEMS:
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
