"""Valid data files of every format, ready to be mutated."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from random import Random
from typing import Any, NamedTuple

from tests.fuzz_data.chat_formats import QWEN, ChatFormat

Record = dict[str, Any]
KeyPath = tuple[Any, ...]

LISTS, LINES, TABLES = (".json", ".json.gz"), (".jsonl", ".jsonl.gz"), (".parquet",)
TEXTS, PACKED = (*LISTS, *LINES), (".json.gz", ".jsonl.gz")

# Names of fields that mean something.
RECORD_FIELDS = (
    *("system", "tools", "functions", "history", "chosen", "rejected", "label", "query", "input", "completion"),
    "system_prompt",
)
TURN_FIELDS = (
    *("train", "loss", "weight", "images", "video", "tool_calls", "function_call", "tool_call_id", "reasoning"),
    *("loss_weight", "train_detail"),
)
TOOL_FIELDS = (
    *("function", "name", "name_for_model", "name_for_human", "description", "description_for_model", "parameters"),
    "input_schema",
)
CALL_FIELDS = ("arguments", "id", "type", "tool_calls", "function_call", "tool_call_id")
TEXT_FIELDS = ("from", "value", "role", "content", "instruction", "output", "prompt", "response", "text")
ALL_FIELDS = (
    *(*RECORD_FIELDS, *TURN_FIELDS, *TOOL_FIELDS, *CALL_FIELDS, *TEXT_FIELDS),
    *("messages", "conversations", "Value"),
)


class Expect(Enum):
    """The expected result of reading a mutated file. The oracle (``oracle.py``) gives the details."""

    SAME = "the samples of the original file"
    ORACLE = "the samples and faults of the oracle"
    FAULT = "the samples and faults of the oracle, at least one fault"
    REFUSED = "a fault after which nothing is read, also if invalid records are skipped"
    ORACLE_OR_REFUSED = "the samples and faults of the oracle, or a fault after which nothing is read"
    NO_CRASH = "no crash, and a report that adds up"


@dataclass(frozen=True)
class Case:
    """A mutated file.

    Attributes:
        rows: the rows of a table, which the oracle cannot read itself.
        limit: replaces the largest size of a record, so that files beyond it can be small.
        chunk: bytes and rows that are read at once; ``None`` is the default.
        chat: the chat format that the file is read with.
    """

    mutation: str
    name: str
    data: bytes
    expect: Expect
    original: list[Record]
    rows: list[Record] | None = None
    limit: int | None = None
    chunk: int | None = None
    chat: ChatFormat = QWEN


_TOOL = {
    "name": "weather",
    "description": "Weather of a city — 天气",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"enum": [1, 2.5, None]}}},
}


def _turn(author: str, text: str, **fields: Any) -> Record:
    return {"from": author, "value": text, **fields}


def _message(role: str, content: Any, **fields: Any) -> Record:
    return {"role": role, "content": content, **fields}


def _chat(n: int) -> Record:
    turns = [_turn("user", f"Frage {n}: café in 北京?"), _turn("assistant", f"Answer {n} 🙂")]
    turns += [_turn("user", f"and {n} more"), _turn("assistant", f"no {n}", weight=0.5)] if n % 2 else []
    return {"id": f"{n}", "conversations": [_turn("system", f"You are cat {n}."), *turns] if n % 3 == 0 else turns}


def _tool_chat(n: int) -> Record:
    call = {"name": "weather", "arguments": {"city": f"Ulm {n}", "days": n, "b": None, "a": [[1, 2.5], {}]}}
    turns = [
        _turn("human", f"Weather {n}: wie wird's?"),
        _turn("function_call", json.dumps(call if n % 2 else [call, call], ensure_ascii=False)),
        *[_turn("observation", f"{n} °C\n")] * (1 if n % 2 else 2),
        _turn("gpt", f"It is {n} degrees.", **({} if n % 3 else {"train": True})),
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


def _document(n: int) -> Record:
    return {"text": f"Kapitel {n}: <|im_end|>\r\n{{{{name}}}} 北京 🙂", "id": n, **({} if n % 2 else {"weight": 0.5})}


_ARGUMENTS: tuple[Any, ...] = (
    {}, {"city": "Ulm", "days": 3, "is_long": True}, {"a": None, "b": [1.5, "2", {"c": []}], "d": 1e-07},
    {"text": "</parameter>\n</tool_call><|im_end|>", "more": "  two\nlines \n"}, {"an": "", "empty": {}}, {"é北": "12"},
)  # fmt: skip


def _thoughts(n: int) -> Record:
    """Answers with thinking in its field, in the text or without, some with calls; control tokens in texts."""
    arguments = _ARGUMENTS[n % len(_ARGUMENTS)]
    function = {"name": "weather", "arguments": arguments if n % 2 else json.dumps(arguments, ensure_ascii=False)}
    calls = [{"type": "function", "function": function}] * (1 + n % 2)
    asks = _message("assistant", "Let me look." if n % 3 else "", reasoning_content=f"\nstep {n}\n", tool_calls=calls)
    thought = f"<think>\nso {n}\n</think>\n\n" if n % 2 else ""
    return {
        "messages": [
            *([_message("system", f" Rules <|im_end|> {n}\n")] if n % 4 == 0 else []),
            _message("user", f"<|im_start|>system\nQuestion {n} </think>?"),
            *([asks, *[_message("tool", f" {n} °C <|im_start|>\n")] * (1 + n % 2)] if n % 3 else []),
            _message("assistant", f"{thought}Answer {n} <|im_end|>\n"),
            *([_message("user", f"<tool_response>{n}</tool_response>")] if n % 5 == 0 else []),
            _message("user", f"\nand {n}?"),
            _message("assistant", f"no {n}\n", **({"reasoning_content": f"why {n}"} if n % 2 else {})),
        ],
        **({"tools": [{"type": "function", "function": _TOOL}]} if n % 3 else {}),
    }


FORMATS = {
    "chats": _chat, "tools": _tool_chat, "messages": _openai_chat, "alpaca": _alpaca, "pairs": _pair,
    "texts": _document, "thoughts": _thoughts,
}  # fmt: skip


def _as_row(record: Record) -> Record:
    """Give the columns of a table one type each: join the parts of a text, encode tools as JSON."""
    row = dict(record)
    if isinstance(row.get("tools"), list):
        row["tools"] = json.dumps(row["tools"])
    if "messages" in row:
        parts = [turn["content"] if isinstance(turn["content"], list) else [] for turn in row["messages"]]
        texts = ["".join(part["text"] for part in turn_parts) for turn_parts in parts]
        turns = zip(row["messages"], texts, strict=True)
        row["messages"] = [_with_argument_texts({**turn, "content": text} if text else turn) for turn, text in turns]
    return row


def _with_argument_texts(turn: Record) -> Record:
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        if isinstance(call["function"]["arguments"], dict)
        else call
        for call in turn.get("tool_calls", ())
    ]
    return {**turn, "tool_calls": calls} if calls else turn


class ValidFile:
    """A valid file, and the record in it that is mutated.

    Attributes:
        random: the source of all random choices.
        suffix: the ending of the file's name.
    """

    def __init__(self, random: Random, mutation: str, format: str, suffix: str) -> None:
        self.random, self.suffix = random, suffix
        self._mutation, self._format = mutation, format
        first = random.randrange(1000)
        records = [FORMATS[format](first + n) for n in range(random.randint(5, 10))]
        self.records = [_as_row(record) for record in records] if suffix in TABLES else records
        self.index = random.randrange(len(records))
        self.record = self.records[self.index]

    def record_texts(self) -> list[bytes]:
        ascii_only = self.random.random() < 0.5
        return [json.dumps(record, ensure_ascii=ascii_only).encode() for record in self.records]

    def join(self, texts: Sequence[bytes]) -> bytes:
        if self.suffix in LINES:
            return b"\n".join(texts) + self.random.choice([b"", b"\n"])
        separator = self.random.choice([b", ", b",\n", b"\n ,\n"])
        return b"[" + self.random.choice([b"", b"\n"]) + separator.join(texts) + self.random.choice([b"]", b"\n]\n"])

    def text(self) -> bytes:
        return self.join(self.record_texts())

    def with_bytes(self, data: bytes, expect: Expect, suffix: str | None = None, **fields: Any) -> Case:
        """Build a case from the bytes of the file."""
        return Case(self._mutation, self._format + (suffix or self.suffix), data, expect, self.records, **fields)

    def with_text(self, text: bytes, expect: Expect = Expect.ORACLE, **fields: Any) -> Case:
        """Build a case from the text of the file, compressing it if needed."""
        return self.with_bytes(gzip.compress(text, mtime=0) if self.suffix in PACKED else text, expect, **fields)

    def with_record_text(self, text: bytes, expect: Expect = Expect.ORACLE) -> Case:
        """Build a case with another text of the record."""
        texts = self.record_texts()
        texts[self.index] = text
        return self.with_text(self.join(texts), expect)

    def with_value(self, path: KeyPath, value: Any, expect: Expect = Expect.ORACLE) -> Case:
        """Build a case with another value in the record."""
        return self.with_record_text(json.dumps(replace_at(self.record, path, value)).encode(), expect)

    def with_json(self, path: KeyPath, text: str, expect: Expect = Expect.ORACLE) -> Case:
        """Build a case with another value in the record, given as JSON, valid or not."""
        value = self.record
        if JSON in path:
            outer, path = path[: path.index(JSON)], path[path.index(JSON) + 1 :]
            text = json.dumps(with_json(json.loads(value_at(value, outer)), path, text))
            path = outer
        return self.with_record_text(with_json(value, path, text).encode(), expect)

    def random_path(self, *types: type, inside: bool = False) -> KeyPath:
        """Return the path of a value of the record; ``inside`` includes values within JSON text of the record."""
        paths = nodes(self.record, inside=inside)
        return self.random.choice([path for path, value in paths if isinstance(value, types or object)])

    def random_owner(self) -> KeyPath:
        """Return the path of the record or of a turn: objects in which unknown fields are ignored."""
        paths = [path for path, value in nodes(self.record) if len(path) == 2 and isinstance(value, dict)]
        return self.random.choice([(), *(path for path in paths if path[0] in ("conversations", "messages"))])


Mutate = Callable[[ValidFile], Case]


class Mutation(NamedTuple):
    """A mutation, and the endings of the files that it applies to."""

    suffixes: tuple[str, ...]
    mutate: Mutate


class Mutations(dict[str, Mutation]):
    """Mutations by the names of their functions."""

    def __init__(self, suffixes: tuple[str, ...]) -> None:
        super().__init__()
        self.suffixes = suffixes

    def register(self, mutate: Mutate) -> Mutate:
        self[mutate.__name__.strip("_")] = Mutation(self.suffixes, mutate)
        return mutate


JSON = "\0"
"""In a path: go from a string to the value that it encodes as JSON."""


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


def replace_at(value: Any, path: KeyPath, new: Any) -> Any:
    if not path:
        return new
    if path[0] == JSON:
        return json.dumps(replace_at(json.loads(value), path[1:], new))
    copy = value.copy()
    copy[path[0]] = replace_at(value[path[0]], path[1:], new)
    return copy


def with_json(value: Any, path: KeyPath, text: str) -> str:
    marker = "\0here\0"
    return json.dumps(replace_at(value, path, marker), ensure_ascii=False).replace(json.dumps(marker), text)
