"""The rows of an evaluation in a file that grows, so that the same command goes on after it was killed."""

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
Key = tuple[str | int, ...]
"""The values of a row that name it."""

ANSWER_KEY = ("model", "set", "where")
"""What names an answer: its model, the set, and the place of the question."""

_OTHER = "Give another folder, or remove the file"


class KeptRows:
    """A file of what decides its rows, then the rows; as a context manager this process's.

    Args:
        run: what decides the rows, as JSON values by name.
        key: fields of a row that name it.

    Attributes:
        rows: by the values of these fields.

    Raises:
        ConfigError: the file is another run's, or another process is writing it.
    """

    def __init__(self, path: Path, run: Mapping[str, Any], key: Sequence[str] = ANSWER_KEY) -> None:
        self._path, self._run, self.key = path, json.loads(json.dumps(run)), tuple(key)
        self.rows: dict[Key, Row] = {}

    def __enter__(self) -> KeptRows:
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
            self.rows[self._key_of(row)] = row
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
            self.rows = {self._key_of(row): row for row in rows}
        except (ValueError, LookupError, TypeError):
            raise ConfigError(f"{self._path} exists, and this command did not write it", _OTHER) from None
        changed = [name for name, value in self._run.items() if run.get(name) != value]
        if changed:
            raise ConfigError(f"{self._path} was written with other {', '.join(changed)}", _OTHER)
        return self._path.stat().st_size - len(rest)

    def _key_of(self, row: Row) -> Key:
        return tuple(row[name] for name in self.key)
