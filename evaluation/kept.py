"""The answers of an evaluation in a file that grows, so that the same command goes on after it was killed."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from errors import ConfigError
from outputs import stage

logger = logging.getLogger(__name__)

Row = dict[str, Any]
Key = tuple[str, str, str]
"""Model, set, and place of a question."""

_OTHER = "Give another folder, or remove the file"


class KeptAnswers:
    """``answers.jsonl``: what the answers were made of, then a row for each; as a context manager this process's.

    Args:
        run: what decides the answers, as JSON values by name.

    Attributes:
        rows: by model, set and place.

    Raises:
        ConfigError: the file is another run's, or another process is writing it.
    """

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        self._path, self._run = path, json.loads(json.dumps(run))
        self.rows: dict[Key, Row] = {}

    def __enter__(self) -> KeptAnswers:
        with contextlib.ExitStack() as stack:
            stack.enter_context(stage(self._path, f"--output {self._path.parent}", prefix="."))
            complete = self._read()
            if complete is None:
                self._path.write_text(json.dumps({"run": self._run}) + "\n", encoding="utf-8")
            self._file = stack.enter_context(self._path.open("r+", encoding="utf-8"))
            self._file.seek(0, 2)
            if complete is not None and complete < self._file.tell():
                logger.warning("%s: its last line is incomplete, and is written again", self._path)
                self._file.seek(complete)
                self._file.truncate()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def add(self, rows: Sequence[Row]) -> None:
        """Append rows; they are on their way to the disk when this returns."""
        for row in rows:
            self.rows[key_of(row)] = row
        self._file.write("".join(json.dumps(row) + "\n" for row in rows))
        self._file.flush()

    def _read(self) -> int | None:
        """Read the rows, and return the bytes of all complete lines; ``None`` without a file."""
        if not self._path.exists() or not self._path.stat().st_size:
            return None
        *lines, rest = self._path.read_bytes().split(b"\n")
        try:
            run = json.loads(lines[0])["run"]
            rows = [json.loads(line) for line in lines[1:]]
            self.rows = {key_of(row): row for row in rows}
        except (ValueError, LookupError, TypeError):
            raise ConfigError(f"{self._path} exists, and this command did not write it", _OTHER) from None
        changed = [name for name, value in self._run.items() if run.get(name) != value]
        if changed:
            raise ConfigError(f"{self._path} has answers with other {', '.join(changed)}", _OTHER)
        return self._path.stat().st_size - len(rest)


def key_of(row: Row) -> Key:
    return str(row["model"]), str(row["set"]), str(row["where"])
