"""Examples as JSON lines, so that any program can check what is trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from data_utils.blocks import KeptConversation
from data_utils.dataset import DataReader


class ExampleDump:
    """Writes examples to a file, one JSON object per line.

    Args:
        file: open for writing text.
        most: maximum number of lines; ``None`` for all.
    """

    def __init__(self, file: TextIO, most: int | None = None) -> None:
        self._file, self._most = file, most
        self.lines = 0

    def add(self, reader: DataReader, kept: KeptConversation) -> None:
        """Write a conversation that the reader has yielded."""
        if self._most is not None and self.lines >= self._most:
            return
        source = reader.reports[kept.set_name].sources[kept.source].name
        record = example_record(kept, source, reader.encoder.decode)
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self.lines += 1


def open_dump(path: Path) -> TextIO:
    """Open a file for examples. What is no Unicode, as a name in another encoding, becomes a JSON escape."""
    return path.open("w", encoding="utf-8", errors="backslashreplace")


def example_record(kept: KeptConversation, source: str, decode: Callable[[list[int]], str]) -> dict[str, Any]:
    """Return an example as JSON values; docs/data.md describes the keys."""
    encoded = kept.encoded
    pieces, start = [], 0
    for length, role, weight in encoded.spans:
        ids = list(encoded.input_ids[start : start + length])
        pieces.append({"role": role, "weight": weight, "tokens": length, "text": decode(ids)})
        start += length
    return {
        "set": kept.set_name,
        "source": source,
        "where": str(kept.where),
        "copies": kept.copies,
        "pieces": pieces,
        "input_ids": list(encoded.input_ids),
        "labels": encoded.labels,
    }
