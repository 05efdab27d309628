"""Questions of the known benchmarks, read from the files that these publish. Nothing is downloaded.

The folder of a benchmark contains::

    ceval/      dev/SUBJECT_dev.csv    val/SUBJECT_val.csv     with a line of column names; dev explains its answers
    cmmlu/      dev/SUBJECT.csv        test/SUBJECT.csv        with a line of column names
    mmlu/       dev/SUBJECT_dev.csv    test/SUBJECT_test.csv   without one
    gsm8k/      train.jsonl            test.jsonl              question, answer
    humaneval/  HumanEval.jsonl or HumanEval.jsonl.gz          task_id, prompt, test, entry_point, canonical_solution
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_utils.location import Location
from errors import ConfigError, DataError

LETTERS = ("A", "B", "C", "D")

Fields = dict[str, str]
"""A question by the names of its fields: of a choice ``question``, the letters and ``answer``."""


@dataclass(frozen=True)
class Question:
    """A question or an example of a benchmark.

    Attributes:
        where: its file and line.
    """

    where: str
    fields: Fields


@dataclass(frozen=True)
class Subject:
    """Questions that share their examples.

    Attributes:
        name: of the file without its ending; the benchmark's name if it has one file.
        examples: solved ones, in the order of the file.
    """

    name: str
    examples: Sequence[Question]
    questions: Sequence[Question]


@dataclass(frozen=True)
class ChoiceFiles:
    """Where a benchmark of four choices keeps its questions.

    Attributes:
        split: folder of the questions; the examples are in ``dev``.
        has_suffix: names of files end in ``_`` and their folder's name.
        columns: in the file, by the names used here; those that are ``None`` are not used.
        has_header: the first line has the columns' names.
        example_columns: of the files in ``dev``, if they have others.
    """

    split: str
    has_suffix: bool
    columns: Sequence[str]
    has_header: bool = True
    example_columns: Sequence[str] | None = None


CHOICE_FILES = {
    "ceval": ChoiceFiles(
        "val", True, ("id", "question", *LETTERS, "answer"),
        example_columns=("id", "question", *LETTERS, "answer", "explanation"),
    ),
    "cmmlu": ChoiceFiles("test", False, ("", "Question", *LETTERS, "Answer")),
    "mmlu": ChoiceFiles("test", True, ("question", *LETTERS, "answer"), has_header=False),
}  # fmt: skip


def read_subjects(name: str, folder: Path) -> list[Subject]:
    """Read a benchmark.

    Args:
        folder: of all benchmarks; this one's has its name.

    Raises:
        ConfigError: a folder or a file is missing.
        DataError: a file that is no such file of this benchmark, or has no questions.
    """
    own = folder / name
    if not own.is_dir():
        raise ConfigError(f"--data_dir {folder}: there is no folder {name}", f"Unpack the benchmark's files into {own}")
    if name in CHOICE_FILES:
        return _read_choices(name, own, CHOICE_FILES[name])
    if name == "gsm8k":
        examples, questions = (
            _read_lines(own / f"{split}.jsonl", ("question", "answer")) for split in ("train", "test")
        )
        return [Subject(name, examples, questions)]
    files = [own / f"HumanEval.jsonl{ending}" for ending in ("", ".gz")]
    file = next((file for file in files if file.is_file()), files[0])
    return [Subject(name, (), _read_lines(file, ("task_id", "prompt", "test", "entry_point")))]


# ------------------------------------------------------------------------------------------------------------ choices


def _read_choices(name: str, folder: Path, files: ChoiceFiles) -> list[Subject]:
    ending = f"_{files.split}.csv" if files.has_suffix else ".csv"
    paths = sorted(path for path in (folder / files.split).glob(f"*{ending}") if not path.name.startswith("."))
    if not paths:
        what = f"--data_dir: {folder / files.split} has no files *{ending}"
        raise ConfigError(what, f"Unpack the files of {name} there")
    subjects = []
    for path in paths:
        subject = path.name.removesuffix(ending)
        of_examples = folder / "dev" / (f"{subject}_dev.csv" if files.has_suffix else path.name)
        columns = files.example_columns or files.columns
        examples = list(_rows(name, of_examples, columns, files.has_header)) if of_examples.is_file() else []
        questions = list(_rows(name, path, files.columns, files.has_header))
        if not questions:
            raise DataError(str(path), "contains no questions", f"Copy the file of {name} again")
        subjects.append(Subject(subject, examples, questions))
    return subjects


def _rows(name: str, path: Path, columns: Sequence[str], has_header: bool) -> Iterator[Question]:
    """Yield the questions of a file.

    Raises:
        DataError: other columns than this benchmark has, an answer that is no letter, or no CSV.
    """
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    expected = ",".join(columns) if has_header else f"no column names, and {len(columns)} values: {','.join(columns)}"
    fix = f"A file of {name} has {expected}"
    line = 1
    try:
        for row in reader:
            where = f"{path}:{line}"
            line = reader.line_num + 1
            if not row:
                continue
            if has_header:
                if [each.strip() for each in row] != list(columns):
                    raise DataError(where, f"is no file of {name}: its first line is {','.join(row)[:60]!r}", fix)
                has_header = False
                continue
            if len(row) != len(columns):
                raise DataError(where, f"has {len(row)} values, not {len(columns)}", fix)
            fields = {
                column.lower() if len(column) > 1 else column: value for column, value in zip(columns, row, strict=True)
            }
            fields["answer"] = fields["answer"].strip()
            if fields["answer"] not in LETTERS:
                raise DataError(where, f"the answer {fields['answer'][:20]!r} is none of A, B, C, D", fix)
            yield Question(where, fields)
    except csv.Error as error:
        raise DataError(f"{path}:{line}", f"is no CSV ({error})", fix) from None


# ----------------------------------------------------------------------------------------------------------- JSON lines


def _read_lines(path: Path, names: Sequence[str]) -> list[Question]:
    """Read the objects of a file of JSON lines, which must have texts of these names.

    Raises:
        ConfigError: there is no such file.
        DataError: other objects, or none at all.
    """
    fix = f"A line of this file is an object with the texts {', '.join(names)}"
    questions = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = str(Location(str(path), number))
        try:
            value: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(where, f"is no JSON ({error})", fix) from None
        missing = [name for name in names if not isinstance(value, dict) or not isinstance(value.get(name), str)]
        if missing:
            raise DataError(where, f"has no text {missing[0]!r}", fix)
        questions.append(Question(where, {key: text for key, text in value.items() if isinstance(text, str)}))
    if not questions:
        raise DataError(str(path), "contains no questions", fix)
    return questions


def _text(path: Path) -> str:
    """Return the text of a file, which may be compressed.

    Raises:
        ConfigError: there is no such file.
        DataError: it is not UTF-8, or damaged.
    """
    if not path.is_file():
        raise ConfigError(f"--data_dir: there is no file {path}", "Copy the file of the benchmark there")
    data = path.read_bytes()
    try:
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            str(path), f"is not UTF-8 (byte {error.start})", "Copy the file of the benchmark again"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(str(path), f"cannot be unpacked ({error})", "Copy the file of the benchmark again") from None
