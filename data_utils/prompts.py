"""Prompts of data files: records of every format, with or without an answer at their end; a .txt file has one a line.

An answer at the end of a record is left out: it is what a model will write. Plain texts are prompts as they are.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from chat.turns import Turn
from data_utils.files import data_files, read_records
from data_utils.formats import FORMATS, Format, check_unambiguous, recognise
from data_utils.formats.pairs import PAIRS
from data_utils.formats.writing import THINKING_FIELD, write_messages
from data_utils.json_stream import MAX_RECORD_BYTES, complete_lines
from data_utils.location import Location
from data_utils.other_files import check_encoding
from data_utils.schema import Conversation, Record
from errors import ConfigError, DataError, numbered

_SHOWN_FAULTS = 20
# The field of the answer by that of the question, of formats in which a record has both.
_ANSWER_FIELDS = {"alpaca": {"instruction": "output"}, "pairs": dict(reversed(PAIRS))}


class Prompts:
    """The prompts of a file or a folder, as conversations that end before the answer; each loop reads them again.

    Attributes:
        keys: of all prompts, in their order; see :func:`prompt_key`.
        digest: of all that they contain, as a hexadecimal number.

    Raises:
        ConfigError: no such format.
        DataError: no such file, invalid records (up to 20 of them), or no prompt at all.
    """

    def __init__(self, path: Path, data_format: str = "auto") -> None:
        if data_format not in ("auto", *FORMATS):
            raise ConfigError(f"--data_format {data_format} is unknown", f"Give one of {', '.join(['auto', *FORMATS])}")
        self._format = data_format
        self._files = data_files(path)
        self.keys, self.digest = self._checked()

    def _checked(self) -> tuple[array[int], str]:
        faults: list[DataError] = []
        keys, digest = array("Q"), hashlib.sha256()
        for item in self._parsed():
            if isinstance(item, Conversation):
                record = prompt_record(item)
                keys.append(prompt_key(record))
                digest.update(_json(record))
                continue
            faults.append(item)
            if len(faults) == _SHOWN_FAULTS:
                break
        if len(faults) == 1:
            raise faults[0]
        if faults:
            raise DataError(str(self._files[0]), numbered(f"{len(faults)} faults, nothing is answered", faults))
        return keys, digest.hexdigest()

    def __iter__(self) -> Iterator[Conversation]:
        """
        Raises:
            DataError: the files have changed since they were checked.
        """
        count = 0
        for count, item in enumerate(self._parsed(), 1):
            if isinstance(item, DataError):
                raise item
            if count > len(self.keys) or prompt_key(prompt_record(item)) != self.keys[count - 1]:
                raise DataError(item.where, "has changed since the start", "Start again")
            yield item
        if count < len(self.keys):
            raise DataError(str(self._files[-1]), "has become shorter since the start", "Start again")

    def _parsed(self) -> Iterator[Conversation | DataError]:
        for path in self._files:
            try:
                yield from self._of_file(path)
            except DataError as error:
                yield error

    def _of_file(self, path: Path) -> Iterator[Conversation | DataError]:
        known = FORMATS.get(self._format)
        for where, value in read_records(path, is_text=self._format == "text", read_text=_prompt_lines):
            if isinstance(value, DataError):
                yield value
            elif isinstance(value, Turn):
                yield Conversation((value,), where)
            else:
                known = known or _recognise(value, where)
                try:
                    if self._format == "auto":
                        check_unambiguous(value, where)
                    yield _without_answer(known.parse(_completed(value, known), where))
                except DataError as error:
                    yield error


def _prompt_lines(chunks: Iterator[bytes], path: str) -> Iterator[tuple[Location, object]]:
    """Yield a user's turn for each line of a text that is not blank; only the line's end is cut.

    Raises:
        DataError: a text in another encoding, or a line that is too long.
    """
    number, is_empty = 0, True
    for block in complete_lines(chunks):
        for line in block.removesuffix(b"\n").split(b"\n"):
            number += 1
            where = Location(path, number)
            if number == 1:
                check_encoding(line, path)
                line = line.removeprefix(codecs.BOM_UTF8)
            if len(line) > MAX_RECORD_BYTES:
                raise DataError(where, f"the line has more than {MAX_RECORD_BYTES >> 20} MiB", "Is it one prompt?")
            if not line.strip():
                continue
            is_empty = False
            yield where, _turn_of(line.removesuffix(b"\r"), where)
    if is_empty:
        yield Location(path), DataError(path, "contains no prompt", "Write one on each line")


def _turn_of(line: bytes, where: Location) -> Turn | DataError:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        return DataError(where, f"is not UTF-8 (byte 0x{line[error.start]:02x})", "Save the file as UTF-8")
    if "\0" in text:
        return DataError(where, "contains a zero byte, so it is no text", "Correct the line")
    return Turn("user", text)


def _recognise(record: object, where: Location) -> Format:
    """Return the format of a record that may lack its answer.

    Raises:
        DataError: none that is known.
    """
    if not any(format_.fits(record) for format_ in FORMATS.values() if format_.name != "text"):
        for name in _ANSWER_FIELDS:
            if FORMATS[name].fits(_completed(record, FORMATS[name])):
                return FORMATS[name]
    return recognise(record, where)


def _completed(record: object, format_: Format) -> object:
    """Return a record that has a question alone with an empty answer, as its format needs it; others as they are."""
    if not isinstance(record, dict) or format_.fits(record):
        return record
    answers = {
        answer: [] if isinstance(record[question], list) else ""
        for question, answer in _ANSWER_FIELDS.get(format_.name, {}).items()
        if record.get(question) is not None
    }
    return {**record, **answers}


def _without_answer(conversation: Conversation) -> Conversation:
    """Return a conversation without the answer that it ends with.

    Raises:
        DataError: nothing precedes that answer.
    """
    turns = conversation.turns
    prompt = turns[:-1] if turns[-1].role == "assistant" else turns
    if not prompt:
        raise DataError(str(conversation.where), "has an answer, and nothing to answer", "Remove the record")
    return replace(conversation, turns=prompt)


def prompt_record(conversation: Conversation) -> Record:
    """Return a prompt as a record of the format ``messages``, or of ``text``."""
    if conversation.is_text:
        return {"text": conversation.turns[0].content}
    return write_messages(conversation, {})


def prompt_key(record: Record) -> int:
    """Return 64 bits that tell the record of a prompt from others, without thinking, which a model may not read."""
    if "messages" in record:
        record = {**record, "messages": [_without_thinking(message) for message in record["messages"]]}
    return int.from_bytes(hashlib.sha256(_json(record)).digest()[:8], "little")


def _without_thinking(message: Record) -> Record:
    return {name: value for name, value in message.items() if name != THINKING_FIELD}


def _json(record: Record) -> bytes:
    return json.dumps(record, sort_keys=True).encode()
