"""Valid data files, about to be damaged."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from random import Random
from typing import Any

Record = dict[str, Any]
KeyPath = tuple[Any, ...]


class Must(Enum):
    """What a damaged file has to come to. In every case but ``REFUSED`` and ``ANY`` the plain reading says the rest."""

    SAME = "exactly the samples of the file before"
    READ = "what the plain reading gives"
    FAULTY = "what the plain reading gives, and something is refused"
    REFUSED = "a fault that hides the rest, also where bad records are skipped"
    LOOSE = "what the plain reading gives, or a fault that hides the rest"
    ANY = "no crash, and an account that adds up"


@dataclass(frozen=True)
class Case:
    """A damaged file.

    Attributes:
        rows: the rows of a table, which the plain reading cannot find out.
        limit: stands in for the most that a record may take, to keep what is beyond it small.
        chunk: how many bytes, and rows, are read at once; ``None`` is as usual.
    """

    kind: str
    name: str
    data: bytes
    must: Must
    original: list[Record]
    rows: list[Record] | None = None
    limit: int | None = None
    chunk: int | None = None


_TOOL = {
    "name": "weather",
    "description": "Weather of a city — 天气",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"enum": [1, 2.5, None]}}},
}


def _said(author: str, text: str, **fields: Any) -> Record:
    return {"from": author, "value": text, **fields}


def _message(role: str, content: Any, **fields: Any) -> Record:
    return {"role": role, "content": content, **fields}


def _chat(n: int) -> Record:
    turns = [_said("user", f"Frage {n}: café in 北京?"), _said("assistant", f"Answer {n} 🙂")]
    turns += [_said("user", f"and {n} more"), _said("assistant", f"no {n}", weight=0.5)] if n % 2 else []
    return {"id": f"{n}", "conversations": [_said("system", f"You are cat {n}."), *turns] if n % 3 == 0 else turns}


def _tool_chat(n: int) -> Record:
    call = {"name": "weather", "arguments": {"city": f"Ulm {n}", "days": n, "b": None, "a": [[1, 2.5], {}]}}
    turns = [
        _said("human", f"Weather {n}: wie wird's?"),
        _said("function_call", json.dumps(call if n % 2 else [call, call], ensure_ascii=False)),
        *[_said("observation", f"{n} °C\n")] * (1 if n % 2 else 2),
        _said("gpt", f"It is {n} degrees.", **({} if n % 3 else {"train": True})),
    ]
    return {"conversations": turns, "tools": json.dumps([_TOOL]) if n % 2 else [_TOOL], "system": f"System {n}"}


def _openai_chat(n: int) -> Record:
    function = {"name": "weather", "arguments": json.dumps({"city": f"Köln {n}"})}
    calls = [{"id": f"call_{i}", "type": "function", "function": function} for i in (1, 2)]
    results = [_message("tool", f"result {n}.{i}", tool_call_id=f"call_{i}") for i in (2, 1)]
    return {
        "messages": [
            _message("developer" if n % 2 else "system", f"Be brief {n}."),
            _message("user", [{"type": "text", "text": f"Part {n}, "}, {"type": "text", "text": "天气?"}]),
            *([_message("assistant", None, tool_calls=calls), *results] if n % 3 else []),
            _message("assistant", f"Sunny {n}", loss=True),
        ],
        **({"tools": [{"type": "function", "function": _TOOL}]} if n % 3 else {}),
    }


def _alpaca(n: int) -> Record:
    texts = {"instruction": f"Translate {n} 北", "input": f"text {n}" if n % 3 else "", "output": f"Übersetzt {n}"}
    history = [[f"before {n}", f"said {n}"], ["e\u0301", "ü"]] if n % 2 else []
    return {**texts, "system": f"Translator {n}", "history": history}


def _pair(n: int) -> Record:
    return {"prompt": f"Question {n}?\n", "response": f"Réponse {n}", "source": {"page": n}}


FORMATS = {"chats": _chat, "tools": _tool_chat, "messages": _openai_chat, "alpaca": _alpaca, "pairs": _pair}


def _as_row(record: Record) -> Record:
    """The same for a table, whose columns have one type each: parts of a text become one, tools their JSON."""
    row = dict(record)
    if isinstance(row.get("tools"), list):
        row["tools"] = json.dumps(row["tools"])
    if "messages" in row:
        parts = [turn["content"] if isinstance(turn["content"], list) else [] for turn in row["messages"]]
        texts = ["".join(part["text"] for part in each) for each in parts]
        turns = zip(row["messages"], texts, strict=True)
        row["messages"] = [{**turn, "content": text} if text else turn for turn, text in turns]
    return row


LISTS, LINES, TABLES = (".json", ".json.gz"), (".jsonl", ".jsonl.gz"), (".parquet",)
TEXTS, PACKED = (*LISTS, *LINES), (".json.gz", ".jsonl.gz")


class Draft:
    """A valid file that is about to be damaged, and the record that is.

    Attributes:
        random: for all that is left to chance.
        suffix: what the file's name ends in.
    """

    def __init__(self, random: Random, kind: str, format: str, suffix: str) -> None:
        self.random, self.suffix = random, suffix
        self._kind, self._format = kind, format
        first = random.randrange(1000)
        records = [FORMATS[format](first + n) for n in range(random.randint(5, 10))]
        self.records = [_as_row(record) for record in records] if suffix in TABLES else records
        self.index = random.randrange(len(records))
        self.record = self.records[self.index]

    def texts(self) -> list[bytes]:
        ascii_only = self.random.random() < 0.5
        return [json.dumps(record, ensure_ascii=ascii_only).encode() for record in self.records]

    def joined(self, texts: Sequence[bytes]) -> bytes:
        if self.suffix in LINES:
            return b"\n".join(texts) + self.random.choice([b"", b"\n"])
        separator = self.random.choice([b", ", b",\n", b"\n ,\n"])
        return b"[" + self.random.choice([b"", b"\n"]) + separator.join(texts) + self.random.choice([b"]", b"\n]\n"])

    def text(self) -> bytes:
        return self.joined(self.texts())

    def file(self, data: bytes, must: Must, suffix: str | None = None, **fields: Any) -> Case:
        """The damaged file of its bytes."""
        return Case(self._kind, self._format + (suffix or self.suffix), data, must, self.records, **fields)

    def case(self, text: bytes, must: Must = Must.READ, **fields: Any) -> Case:
        """The damaged file of its text."""
        return self.file(gzip.compress(text, mtime=0) if self.suffix in PACKED else text, must, **fields)

    def changed(self, text: bytes, must: Must = Must.READ) -> Case:
        """The file with another text of its record."""
        texts = self.texts()
        texts[self.index] = text
        return self.case(self.joined(texts), must)

    def with_value(self, path: KeyPath, value: Any, must: Must = Must.READ) -> Case:
        """The file with another value in its record."""
        return self.changed(json.dumps(replaced(self.record, path, value)).encode(), must)

    def with_json(self, path: KeyPath, text: str, must: Must = Must.READ) -> Case:
        """The same where the value is given as JSON, or as what is none."""
        value = self.record
        if JSON in path:
            outer, path = path[: path.index(JSON)], path[path.index(JSON) + 1 :]
            text = json.dumps(with_json(json.loads(value_at(value, outer)), path, text))
            path = outer
        return self.changed(with_json(value, path, text).encode(), must)

    def path(self, *types: type, inside: bool = False) -> KeyPath:
        """To some value of the record, with ``inside`` perhaps one within JSON that is a text of the record."""
        found = nodes(self.record, inside=inside)
        return self.random.choice([path for path, value in found if isinstance(value, types or object)])

    def owner(self) -> KeyPath:
        """To the record or a turn of it: objects in which other fields mean nothing."""
        paths = [path for path, value in nodes(self.record) if len(path) == 2 and isinstance(value, dict)]
        return self.random.choice([(), *(path for path in paths if path[0] in ("conversations", "messages"))])


JSON = "\0"
"""In a path: the value of the JSON that a text is."""


def nodes(value: Any, path: KeyPath = (), inside: bool = False) -> Iterator[tuple[KeyPath, Any]]:
    yield path, value
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    elif inside and isinstance(value, str) and value[:1] in ("{", "["):
        items = [(JSON, json.loads(value))]
    for key, item in items:
        yield from nodes(item, (*path, key), inside)


def value_at(value: Any, path: KeyPath) -> Any:
    for key in path:
        value = json.loads(value) if key == JSON else value[key]
    return value


def replaced(value: Any, path: KeyPath, new: Any) -> Any:
    if not path:
        return new
    if path[0] == JSON:
        return json.dumps(replaced(json.loads(value), path[1:], new))
    copy = value.copy()
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


def with_json(value: Any, path: KeyPath, text: str) -> str:
    mark = "\0here\0"
    return json.dumps(replaced(value, path, mark), ensure_ascii=False).replace(json.dumps(mark), text)
