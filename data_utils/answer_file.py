"""A file of answers that grows line by line, and whose run goes on after it was killed.

Beside ``a.jsonl``, which has the answers alone, are ``a.jsonl.run``, which says what they were written with, and
``a.jsonl.errors``, the prompts that have no answer. Neither name is that of a data file, so that the folder is one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from array import array
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from data_utils.prompts import prompt_key
from data_utils.schema import Record
from errors import ConfigError, DataError
from outputs import stage, sync

logger = logging.getLogger(__name__)

_ABSENT = -1
_FIX = "Remove the line, and this answer is written again"
_OTHER_RUN = "Give another name, or remove it"


class AnswerFile:
    """The answers to prompts: as a context manager it belongs to this process, and has read what is there.

    The answers are numbered: prompt by prompt, ``per_prompt`` to each. Lines are added in any order, and lie in that of
    their numbers after :meth:`finish`.

    Args:
        run: what decides the answers, as JSON values by the names of flags.
        keys: of the prompts, see ``prompt_key``.

    Attributes:
        count: answers in the file; ``cut`` of them were ended by their length limit.
        failed: prompts without an answer that were recorded since the start.

    Raises:
        ConfigError: the file is another run's, or another process is writing it.
        DataError: a line is damaged, or answers another prompt.
    """

    def __init__(self, path: Path, run: Mapping[str, Any], keys: array[int], per_prompt: int) -> None:
        self._path, self._run, self._keys, self._per_prompt = path, dict(run), keys, per_prompt
        self._offsets = array("q", [_ABSENT]) * (len(keys) * per_prompt)
        self._last = -1  # number of the answer on the last line
        self._is_sorted = True
        self.count = self.cut = self.failed = 0
        self.errors_path = path.with_name(f"{path.name}.errors")
        self._run_path = path.with_name(f"{path.name}.run")

    def __enter__(self) -> AnswerFile:
        with contextlib.ExitStack() as stack:
            self._folder = stack.enter_context(stage(self._path, f"--output {self._path}", prefix="."))
            self._check_run()
            self._write_run()
            self._file = stack.enter_context(FileIO(self._path, "a+"))
            self._read_lines()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        if not self._file.seek(0, os.SEEK_END):  # nothing to continue
            for path in (self._path, self._run_path):
                path.unlink(missing_ok=True)
        self._stack.close()

    def __contains__(self, number: int) -> bool:
        return self._offsets[number] != _ABSENT

    @property
    def missing(self) -> int:
        """Return the number of answers that the file lacks."""
        return len(self._offsets) - self.count

    def add(self, number: int, line: Record) -> None:
        """Write an answer; it is on its way to the disk when this returns.

        Raises:
            OSError: the disk is full; what there was of the line is removed.
        """
        index, choice = divmod(number, self._per_prompt)
        text = _encoded({"index": index, "choice": choice, **line})
        self._note(number, _append(self._file, text, self._path), line)

    def add_error(self, number: int, where: object, reason: str) -> None:
        """Record that an answer could not be written, in the file of errors; that of an earlier start is replaced."""
        index, choice = divmod(number, self._per_prompt)
        if not self.failed:
            self._errors = self._stack.enter_context(FileIO(self.errors_path, "w"))
        self.failed += 1
        line = {"index": index, "choice": choice, "where": str(where), "error": reason}
        _append(self._errors, _encoded(line), self.errors_path)

    def finish(self) -> None:
        """Bring the lines in order, and write them to disk; call it when every missing answer was tried."""
        if not self._is_sorted:
            self._sort()
        sync(self._path)
        if not self.failed:
            self.errors_path.unlink(missing_ok=True)

    # ------------------------------------------------------------------------------------------------------- reading

    def _check_run(self) -> None:
        """Raise ``ConfigError`` if the file has answers that were not written with the same flags, weights and data."""
        if not self._path.exists() or not self._path.stat().st_size:
            return
        try:
            saved = json.loads(self._run_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            what = f"--output {self._path} exists, and was not written by this command"
            raise ConfigError(what, _OTHER_RUN) from None
        for name, value in self._run.items():
            before = saved.get(name) if isinstance(saved, dict) else None
            if before == value:
                continue
            if name == "data_sha256":
                what = f"--output {self._path} has the answers to other prompts than --data_path has now"
            elif name.endswith("_sha256"):
                flag, _, part = name.removesuffix("_sha256").partition(".")
                what = f"--output {self._path} has answers of other {part} than --{flag} has now"
            else:
                what = f"--output {self._path} is of a run with --{name} {before}, not {value}"
            raise ConfigError(what, _OTHER_RUN)

    def _write_run(self) -> None:
        staged = self._folder.path / self._run_path.name
        staged.write_text(json.dumps(self._run, indent=1) + "\n", encoding="utf-8")
        os.replace(staged, self._run_path)

    def _read_lines(self) -> None:
        """Note where each answer is; cut a last line that is not complete.

        Raises:
            DataError: a line is damaged, or answers another prompt.
        """
        offset = 0
        with self._path.open("rb") as lines:
            for line_number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    logger.warning("--output %s: its last line is incomplete, and is written again", self._path)
                    self._file.truncate(offset)
                    break
                where = f"{self._path}:{line_number}"
                value, number, key = self._parsed(line, where)
                if number in self:
                    raise DataError(where, "answers what an earlier line has answered", _FIX)
                if key != self._keys[number // self._per_prompt]:
                    raise DataError(where, "answers another prompt than --data_path has at its index", _FIX)
                self._note(number, offset, value)
                offset += len(line)

    def _parsed(self, line: bytes, where: str) -> tuple[Record, int, int]:
        """Return a line, the number of its answer, and the key of its prompt."""
        try:
            value: Record = json.loads(line)
            index, choice, answer = value["index"], value["choice"], value["answer"]
            if not (type(index) is type(choice) is int and isinstance(answer, str)):
                raise TypeError
            key = prompt_key(_prompt_of(value))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise DataError(where, "is damaged", _FIX) from None
        if not (0 <= index < len(self._keys) and 0 <= choice < self._per_prompt):
            what = f"has index {index} and choice {choice} of {len(self._keys)} prompts with {self._per_prompt} answers"
            raise DataError(where, what, _FIX)
        return value, index * self._per_prompt + choice, key

    def _note(self, number: int, offset: int, line: Record) -> None:
        self._is_sorted = self._is_sorted and number > self._last
        self._offsets[number], self._last = offset, number
        self.count += 1
        self.cut += line.get("finish_reason") == "length"

    # ------------------------------------------------------------------------------------------------------- sorting

    def _sort(self) -> None:
        """Replace the file by one with the lines in order."""
        staged = self._folder.path / self._path.name
        try:
            with self._path.open("rb") as lines, staged.open("wb") as file:
                for offset in self._offsets:
                    if offset != _ABSENT:
                        lines.seek(offset)
                        file.write(lines.readline())
            sync(staged)
        except OSError as error:
            error.filename = str(self._path)
            raise
        os.replace(staged, self._path)


def _prompt_of(line: Record) -> Record:
    """Return the record of the prompt that a line answers.

    Raises:
        ValueError: it has no answer.
    """
    if "text" in line:
        if not line["text"].endswith(line["answer"]):
            raise ValueError
        return {"text": line["text"].removesuffix(line["answer"])}
    *messages, last = line["messages"]
    if last["role"] != "assistant":
        raise ValueError
    return {"messages": messages, **({"tools": line["tools"]} if "tools" in line else {})}


def _encoded(line: Record) -> bytes:
    try:
        return json.dumps(line, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # lone surrogates
        return json.dumps(line).encode() + b"\n"


def _append(file: FileIO, text: bytes, path: Path) -> int:
    """Write a line at the end of a file, not a part of it if the disk is full, and return where it begins."""
    start = file.seek(0, os.SEEK_END)
    rest = memoryview(text)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError as error:
        with contextlib.suppress(OSError):
            file.truncate(start)
        error.filename = str(path)
        raise
    return start
