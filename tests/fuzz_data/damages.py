"""The ways in which files are damaged, and what each must come to."""

from __future__ import annotations

import gzip
import json
import re
import struct
from collections.abc import Callable, Sequence
from datetime import datetime
from decimal import Decimal
from io import BytesIO
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from tests.fuzz_data.drafts import (
    LISTS,
    PACKED,
    TABLES,
    TEXTS,
    Case,
    Draft,
    Must,
    Record,
    nodes,
    replaced,
    value_at,
)

Damage = Callable[[Draft], Case]
KINDS: dict[str, tuple[tuple[str, ...], Damage]] = {}
RARE = ("five_megabytes", "whole_bomb")  # they take long, so they come in every tenth round


def kind(suffixes: tuple[str, ...]) -> Callable[[Damage], Damage]:
    """Register a damage under its name, for files of these kinds."""

    def register(damage: Damage) -> Damage:
        KINDS[damage.__name__.strip("_")] = suffixes, damage
        return damage

    return register


@kind(TEXTS)
def _unchanged(draft: Draft) -> Case:
    return draft.case(draft.text(), Must.SAME)


@kind(TEXTS)
def _byte_order_mark(draft: Draft) -> Case:
    return draft.case(b"\xef\xbb\xbf" + draft.text(), Must.SAME)


@kind(TEXTS)
def _white_space(draft: Draft) -> Case:
    """Blank lines, line ends of Windows, and blanks wherever JSON allows them."""
    random, text = draft.random, draft.text()
    if draft.suffix in LISTS and random.random() < 0.5:
        text = json.dumps(draft.records, indent=random.choice([0, 3])).encode()
    if random.random() < 0.5:
        text = text.replace(b"\n", random.choice([b"\r\n", b"\n\n\n", b" \t\n \n"]))
    before, behind = (bytes(random.choices(b" \t\r\n", k=random.randint(0, 9))) for _ in range(2))
    return draft.case(before + text + behind, Must.SAME)


@kind(TEXTS)
def _spelling(draft: Draft) -> Case:
    """Other escapes and blanks within the record, and its fields in another order."""

    def shuffled(value: Record) -> Record:
        return dict(draft.random.sample(list(value.items()), len(value)))

    record = shuffled(draft.record)
    for path, value in list(nodes(record)):
        if len(path) == 2 and path[0] in ("conversations", "messages"):
            record = replaced(record, path, shuffled(value))
    text = json.dumps(record, ensure_ascii=draft.random.random() < 0.5, separators=(" ,\t", "  :"))
    return draft.changed(re.sub("[é北]", lambda letter: f"\\u{ord(letter[0]):04X}", text).encode(), Must.SAME)


@kind(TEXTS)
def _unknown_keys(draft: Draft) -> Case:
    path = draft.owner()
    value: Any = draft.random.choice([None, True, "x\ud800", 10**30, [[]], {"role": ["system"]}, float("nan")])
    name = draft.random.choice(["note", "источник", "", "a\n\x1b[31m"])
    return draft.with_value(path, {**value_at(draft.record, path), name: value}, Must.SAME)


_RECORD_KEYS = (
    "system",
    "tools",
    "functions",
    "history",
    "chosen",
    "rejected",
    "label",
    "query",
    "input",
    "completion",
)
_TURN_KEYS = ("train", "loss", "weight", "images", "video", "tool_calls", "function_call", "tool_call_id", "reasoning")
_TOOL_KEYS = (
    "function",
    "name",
    "name_for_model",
    "name_for_human",
    "description",
    "description_for_model",
    "parameters",
)
_CALL_KEYS = ("arguments", "id", "type", "tool_calls", "function_call", "tool_call_id")
_TEXT_KEYS = ("from", "value", "role", "content", "instruction", "output", "prompt", "response")
_KEYS = (*_RECORD_KEYS, *_TURN_KEYS, *_TOOL_KEYS, *_CALL_KEYS, *_TEXT_KEYS, "messages", "conversations", "Value")
WRONG = ("null", "true", "false", "0", "-7", "1.5", '""', '"x"', "[]", '["x"]', "{}", '{"x": 1}', "1" * 30)


@kind(TEXTS)
def _null_keys(draft: Draft) -> Case:
    """In the record, a turn, a tool or a call."""
    path = draft.owner()
    names: tuple[str, ...] = _TURN_KEYS if path else (*_TURN_KEYS, *_RECORD_KEYS)
    named = [path for path, value in nodes(draft.record, inside=True) if isinstance(value, dict) and "name" in value]
    if named and draft.random.random() < 0.5:
        path, names = draft.random.choice(named), (*_TOOL_KEYS, *_CALL_KEYS)
    return draft.with_value(path, {**dict.fromkeys(names), **value_at(draft.record, path)}, Must.SAME)


@kind(TEXTS)
def _wrong_types(draft: Draft) -> Case:
    names = (*_TEXT_KEYS, "input", "system", "name")
    texts = [path for path, _ in nodes(draft.record) if path and path[-1] in names]
    path = draft.random.choice(texts) if draft.random.random() < 0.5 else draft.path(inside=True)
    wrong = draft.random.choice(WRONG)
    is_refused = path in texts and wrong not in ("null", '""', '"x"', "[]", "{}")
    return draft.with_json(path, wrong, Must.FAULTY if is_refused else Must.READ)


@kind(TEXTS)
def _weights(draft: Draft) -> Case:
    path = draft.owner()
    numbers = ("true", "false", "null", "0", "0.1", "1e-3", "3", "1e39", "1e-50", "1e308", "-0.0", "-1", '"1"', "[]")
    names = draft.random.sample(_TURN_KEYS[:3], draft.random.randint(1, 2))
    weights = {name: json.loads(draft.random.choice(numbers)) for name in names}
    return draft.with_value(path, {**value_at(draft.record, path), **weights})


@kind(TEXTS)
def _numbers(draft: Draft) -> Case:
    numbers = [
        "9" * 5000,
        "-" + "9" * 400,
        "1e999",
        "-1E+400",
        "1e-999",
        "0." + "1" * 100_000,
        "-0",
        "NaN",
        "-Infinity",
    ]
    number = draft.random.choice(numbers)
    text = json.dumps(f'{{"name": "weather", "arguments": {{"a": {number}}}}}')
    return draft.with_json(draft.path(inside=True), draft.random.choice([number, text]))


@kind(TEXTS)
def _nesting(draft: Draft) -> Case:
    depth = draft.random.choice([150, 400, 10_000, 100_000])
    opening, end = draft.random.choice([("[", "]"), ('{"a":', "}"), ('[{"": ', "}]"), ("[", "")])
    nested = opening * depth + "1" + end * depth
    texts = [nested, json.dumps(nested), json.dumps(f'{{"name": "weather", "arguments": {nested}}}')]
    return draft.with_json(draft.path(inside=True), draft.random.choice(texts))


@kind(TEXTS)
def _control_characters(draft: Draft) -> Case:
    letter = draft.random.choice(["\0", "\x01", "\x1b", "\t", "\n"])
    return draft.with_json(draft.path(str), f'"a{letter}b"', Must.FAULTY)


@kind(TEXTS)
def _escapes(draft: Draft) -> Case:
    """Escaped control characters and halves of a character, also in the name of a field."""
    text = draft.random.choice([r"a\u0000b", r"\ud800", r"\udc00\ud83d x", r"\u001b[31mred", r"\u2028\u0085", r"\x41"])
    if draft.random.random() < 0.2:
        return draft.with_json((), f'{{"{text}": 1, ' + json.dumps(draft.record)[1:])
    return draft.with_json(draft.path(str), f'"{text}"')


@kind(TEXTS)
def _empty_fields(draft: Draft) -> Case:
    path = draft.path(str, list, dict)
    return draft.with_value(path, type(value_at(draft.record, path))())


@kind(TEXTS)
def _five_megabytes(draft: Draft) -> Case:
    text = draft.random.choice(["a", "word ", " ", "\n", "北", "1", "🙂", "e\u0301"])
    return draft.with_value(draft.path(str), text * (5_000_000 // len(text.encode())))


@kind(TEXTS)
def _repeated_keys(draft: Draft) -> Case:
    path = draft.random.choice([path for path, value in nodes(draft.record) if isinstance(value, dict) and value])
    owner = value_at(draft.record, path)
    name = draft.random.choice(list(owner))
    value = draft.random.choice([owner[name], None, "other"])
    return draft.with_json(path, f"{{{json.dumps(name)}: {json.dumps(value)}, {json.dumps(owner)[1:]}", Must.FAULTY)


@kind(TEXTS)
def _other_keys(draft: Draft) -> Case:
    """A field without its name, with another one, or one more that means something."""
    random = draft.random
    owners = [path for path, value in nodes(draft.record, inside=True) if isinstance(value, dict) and value]
    tools = [path for path in owners if "description" in value_at(draft.record, path)]
    path = random.choice(tools if tools and random.random() < 0.3 else owners)
    fields, value = dict(value_at(draft.record, path)), json.loads(random.choice(WRONG))
    way, other = random.choice(["delete", "rename", "add"]), random.choice(_TOOL_KEYS if path in tools else _KEYS)
    if way != "add":
        value = fields.pop(random.choice(list(fields)))
    return draft.with_value(path, fields if way == "delete" else {**fields, other: value})


@kind(TEXTS)
def _moved_turns(draft: Draft) -> Case:
    path = draft.random.choice([path for path, value in nodes(draft.record) if isinstance(value, list)] or [()])
    items = list(value_at(draft.record, path)) if path else [draft.record]
    way = draft.random.choice(["delete", "double", "shuffle", "nest"])
    if items and way == "delete":
        items.pop(draft.random.randrange(len(items)))
    elif items and way == "double":
        items.insert(draft.random.randint(0, len(items)), draft.random.choice(items))
    elif way == "shuffle":
        draft.random.shuffle(items)
    else:
        items = [items]
    return draft.with_value(path, items)


@kind(TEXTS)
def _no_json(draft: Draft) -> Case:
    """What people take for JSON."""
    text = draft.texts()[draft.index]
    wrong = [text.replace(b'"', b"'"), repr(draft.record).encode(), text[:-1] + b",}", text + b",", b"[" + text + b"]"]
    wrong += [comment + text for comment in (b"// note\n", b"# note\n", b"/* note */ ")] + [text + b" // note"]
    if draft.random.random() < 0.5:
        return draft.changed(draft.random.choice(wrong), Must.FAULTY)
    words = ["None", "True", "nan", "undefined", "+1", "01", ".5", "'x'"]
    return draft.with_json(draft.path(), draft.random.choice(words), Must.FAULTY)


@kind(TEXTS)
def _two_on_a_line(draft: Draft) -> Case:
    blank = draft.random.choice([b"", b" ", b"\t"])
    return draft.changed(draft.texts()[draft.index] + blank + draft.texts()[0], Must.FAULTY)


@kind(TEXTS)
def _cut(draft: Draft) -> Case:
    text = draft.text()
    return draft.case(text[: draft.random.randrange(len(text))])


@kind(TEXTS)
def _bytes(draft: Draft) -> Case:
    """Bytes that are changed, left out or put in, anywhere."""
    text = bytearray(draft.text())
    for _ in range(draft.random.randint(1, 3)):
        place, byte = draft.random.randrange(len(text)), draft.random.choice([*b'\n"{}[]:,\\0', *range(256)])
        text[place : place + 1] = draft.random.choice([bytes([byte]), b"", bytes([byte, text[place]])])
    return draft.case(bytes(text))


@kind(TEXTS)
def _behind_the_end(draft: Draft) -> Case:
    text = draft.text().rstrip() + draft.random.choice([b"", b" ", b"\n"])
    return draft.case(text + draft.random.choice([b"x", b"]", b",", b"{}", b"[]", b"null", b'"', b"\xff"]), Must.FAULTY)


@kind(TEXTS)
def _no_utf8(draft: Draft) -> Case:
    """Broken characters, halves of one and overlong ones."""
    text = draft.texts()[draft.index]
    place = draft.random.randrange(1, len(text))
    bad = draft.random.choice(
        [b"\xff", b"\x80", b"\xc3", b"\xed\xa0\x80", b"\xc0\x80", b"\xf5\x80\x80\x80", b"\xf0\x9f"]
    )
    return draft.changed(text[:place] + bad + text[place:], Must.FAULTY)


@kind(TEXTS)
def _encodings(draft: Draft) -> Case:
    text = draft.joined([json.dumps(record, ensure_ascii=False).encode() for record in draft.records]).decode()
    encoding = draft.random.choice(["utf-16", "utf-32", "utf-16-le", "utf-16-be", "gb18030"])
    return draft.case(text.encode(encoding), Must.REFUSED if encoding in ("utf-16", "utf-32") else Must.FAULTY)


@kind(TEXTS)
def _no_records(draft: Draft) -> Case:
    texts = [
        "",
        " \n\t",
        "[]",
        "[ ]\n",
        "{}",
        "null",
        "3",
        '"x"',
        "[[]]",
        "[null, 1]",
        "[",
        "]",
        "{",
        ",",
        "\ufeff",
        "\0",
    ]
    return draft.case(draft.random.choice(texts).encode(), Must.FAULTY)


@kind(TEXTS)
def _many_faults(draft: Draft) -> Case:
    """More of them than are shown."""
    bad = [b"{}", b"null", b'{"prompt": 1, "response": []}', b'{"messages": [{"role": "user"}]}']
    texts = [text if draft.random.random() < 0.2 else draft.random.choice(bad) for text in draft.texts() * 8]
    return draft.case(draft.joined([*texts, b"{}"]), Must.FAULTY)


def _packed(draft: Draft) -> bytearray:
    return bytearray(gzip.compress(draft.text(), mtime=0))


@kind(PACKED)
def _gzip_bytes(draft: Draft) -> Case:
    data = _packed(draft)
    for _ in range(draft.random.randint(1, 3)):
        data[draft.random.randrange(len(data))] = draft.random.randrange(256)
    return draft.file(bytes(data), Must.LOOSE)


@kind(PACKED)
def _gzip_ends(draft: Draft) -> Case:
    """Cut short, with a wrong checksum or length, or with something behind it."""
    data = _packed(draft)
    way = draft.random.choice(["cut", "checksum", "tail"])
    if way == "cut":
        del data[draft.random.randrange(1, len(data)) :]
    elif way == "checksum":
        data[-draft.random.randint(1, 8)] ^= 1 << draft.random.randrange(8)
    else:
        data += draft.random.choice([b"x", b"\n", b"\x1f\x8b", b"\0\0x", b"PAR1", gzip.compress(b"more", mtime=0)[:-1]])
    return draft.file(bytes(data), Must.REFUSED)


@kind(PACKED)
def _gzip_forms(draft: Draft) -> Case:
    """Several members, empty ones, a name in the header, zeros behind the end, other names of the file."""
    text, named = draft.text(), BytesIO()
    place = draft.random.randrange(len(text))
    with gzip.GzipFile("some name.json", "wb", fileobj=named, mtime=0) as file:
        file.write(text)
    whole, *members = (gzip.compress(part, mtime=0) for part in (text, b"", text[:place], b"", text[place:]))
    data = draft.random.choice([b"".join(members), named.getvalue(), whole, whole + bytes(999)])
    return draft.file(data, Must.SAME, suffix=draft.random.choice([draft.suffix, draft.suffix[:-3]]))


@kind(PACKED)
def _gzip_names(draft: Draft) -> Case:
    """A file that is not packed, or no table, or packed twice."""
    if draft.random.random() < 0.5:
        return draft.file(draft.text(), Must.REFUSED, suffix=draft.random.choice([draft.suffix, ".parquet"]))
    return draft.case(bytes(_packed(draft)), Must.FAULTY)


_FLOODS = (b'{"conversations": "a', b'[{"conversations": "a', b'[{"a": 1}, "a', b" ", b"[ ", b'[{"a": 1}, ')


@kind(PACKED)
def _bomb(draft: Draft) -> Case:
    start = draft.random.choice(_FLOODS)
    return draft.case(start + start[-1:] * (1 << 20), Must.REFUSED, limit=1 << 16)


@kind(PACKED)
def _whole_bomb(draft: Draft) -> Case:
    return draft.case(draft.random.choice(_FLOODS[:2]) + b"a" * 100_000_000, Must.REFUSED)


def _columns(rows: Sequence[Record]) -> dict[str, Any]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: pa.array([row.get(name) for row in rows]) for name in names}


def _table(columns: dict[str, Any], **options: Any) -> bytes:
    buffer = BytesIO()
    pq.write_table(
        pa.Table.from_arrays(list(columns.values()), [name.rstrip("*") for name in columns]), buffer, **options
    )
    return buffer.getvalue()


_VALUES: tuple[tuple[Any, Any], ...] = (
    *((pa.int64(), 7), (pa.float16(), 1.5), (pa.bool_(), True), (pa.null(), None), (pa.string(), '{"a": [1, null]}')),
    *((pa.binary(), b"\xff\x00"), (pa.binary(2), b"ab"), (pa.decimal128(5, 2), Decimal("1.25"))),
    *((pa.list_(pa.string()), ["a", None]), (pa.struct([("a", pa.int8())]), {"a": 1})),
    *((pa.map_(pa.string(), pa.int32()), [("k", 1)]), (pa.timestamp("us", "UTC"), datetime(2020, 1, 2))),
)


@kind(TABLES)
def _table_forms(draft: Draft) -> Case:
    """The same rows, written otherwise, with further columns."""
    random, columns = draft.random, _columns(draft.records)
    for name, column in columns.items():
        if column.type == pa.string():
            column = column.cast(random.choice([pa.string(), pa.large_string()]))
            columns[name] = column.dictionary_encode() if random.random() < 0.3 else column
    for number in range(random.randrange(3)):
        type_, value = random.choice(_VALUES)
        columns[f"extra {number}"] = pa.array([value, *[None] * (len(draft.records) - 1)], type_)
    flags = {name: random.random() < 0.5 for name in ("use_dictionary", "write_page_checksum", "store_schema")}
    data = _table(
        dict(random.sample(list(columns.items()), len(columns))),
        compression=random.choice(["none", "snappy", "zstd", "gzip"]),
        row_group_size=random.randint(1, 10),
        data_page_version=random.choice(["1.0", "2.0"]),
        **flags,
    )
    return draft.file(data, Must.SAME, rows=draft.records)


@kind(TABLES)
def _table_values(draft: Draft) -> Case:
    """A value that is missing, or another text."""
    path = draft.path()
    texts = ["", "\0", "x", "\x1b[31m", "🙂", None] if isinstance(value_at(draft.record, path), str) else [None]
    rows = list(draft.records)
    rows[draft.index] = replaced(draft.record, path, draft.random.choice(texts)) or {}
    return draft.file(_table(_columns(rows)), Must.READ, rows=rows)


@kind(TABLES)
def _table_types(draft: Draft) -> Case:
    """A column with values of another type, in all rows or some."""
    columns, (type_, value) = _columns(draft.records), draft.random.choice(_VALUES)
    name = draft.random.choice(list(columns))
    columns[name] = pa.array([value if draft.random.random() < 0.8 else None for _ in draft.records], type_)
    values = [dict(each) if each and pa.types.is_map(type_) else each for each in columns[name].to_pylist()]
    rows = [{**record, name: each} for record, each in zip(draft.records, values, strict=True)]
    return draft.file(_table(columns), Must.READ, rows=rows)


@kind(TABLES)
def _table_columns(draft: Draft) -> Case:
    """A column that is missing, has another name, or stands there twice."""
    columns, way = _columns(draft.records), draft.random.choice(["missing", "renamed", "twice"])
    name, other = draft.random.choice(list(columns)), draft.random.choice([*_KEYS, "x\x1b\n"])
    if way == "twice":
        return draft.file(_table({**columns, f"{name}*": columns[name]}), Must.REFUSED)
    column = columns.pop(name)
    columns |= {other: column} if way == "renamed" else {}
    rows = [{key: value for key, value in row.items() if key != name} for row in draft.records]
    if way == "renamed":
        rows = [{**row, other: record.get(name)} for row, record in zip(rows, draft.records, strict=True)]
    return draft.file(_table(columns), Must.READ, rows=rows)


@kind(TABLES)
def _table_broken(draft: Draft) -> Case:
    """No rows, texts that are not UTF-8, a year that Python does not have, or the end cut off."""
    columns, way = _columns(draft.records), draft.random.choice(["no rows", "no UTF-8", "no year", "cut"])
    if way == "no rows":
        columns = {name: column[:0] for name, column in columns.items()}
    elif way == "no UTF-8":
        bad = pa.array([b"\xff\xfe a"] * len(draft.records), pa.binary()).view(pa.string())
        columns[draft.random.choice(list(columns))] = bad
    elif way == "no year":
        columns["when"] = pa.array([10**12] * len(draft.records), pa.timestamp("s"))
    data = _table(columns)
    return draft.file(data[: draft.random.randrange(1, len(data))] if way == "cut" else data, Must.REFUSED)


@kind(TABLES)
def _table_bytes(draft: Draft) -> Case:
    """Bytes of pages that have checksums, or anywhere."""
    has_checksums = draft.random.random() < 0.5
    compression = draft.random.choice(["none", "snappy", "zstd"])
    data = bytearray(_table(_columns(draft.records), write_page_checksum=has_checksums, compression=compression))
    [footer] = struct.unpack("<I", data[-8:-4])
    for _ in range(draft.random.randint(1, 4)):
        place = draft.random.randrange(4, len(data) - 8 - footer if has_checksums else len(data))
        data[place] = draft.random.randrange(256)
    return draft.file(bytes(data), Must.LOOSE if has_checksums else Must.ANY, rows=draft.records)
