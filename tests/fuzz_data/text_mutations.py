"""Mutations of the text of JSON files, also of compressed ones."""

from __future__ import annotations

import json
import re
from typing import Any

from tests.fuzz_data.valid_files import (
    ALL_FIELDS,
    CALL_FIELDS,
    LISTS,
    RECORD_FIELDS,
    TEXT_FIELDS,
    TEXTS,
    TOOL_FIELDS,
    TURN_FIELDS,
    Case,
    Expect,
    Mutations,
    Record,
    ValidFile,
    nodes,
    replace_at,
    value_at,
)

TEXT_MUTATIONS = Mutations(TEXTS)
_CONTENTS = ("value", "content", "instruction", "output", "prompt", "response", "text", "reasoning_content", "system")
WRONG_VALUES = ("null", "true", "false", "0", "-7", "1.5", '""', '"x"', "[]", '["x"]', "{}", '{"x": 1}', "1" * 30)


@TEXT_MUTATIONS.register
def _unchanged(file: ValidFile) -> Case:
    return file.with_text(file.text(), Expect.SAME)


@TEXT_MUTATIONS.register
def _byte_order_mark(file: ValidFile) -> Case:
    return file.with_text(b"\xef\xbb\xbf" + file.text(), Expect.SAME)


@TEXT_MUTATIONS.register
def _white_space(file: ValidFile) -> Case:
    """Blank lines, Windows line ends, and white space wherever JSON allows it."""
    random, text = file.random, file.text()
    if file.suffix in LISTS and random.random() < 0.5:
        text = json.dumps(file.records, indent=random.choice([0, 3])).encode()
    if random.random() < 0.5:
        text = text.replace(b"\n", random.choice([b"\r\n", b"\n\n\n", b" \t\n \n"]))
    before, after = (bytes(random.choices(b" \t\r\n", k=random.randint(0, 9))) for _ in range(2))
    return file.with_text(before + text + after, Expect.SAME)


@TEXT_MUTATIONS.register
def _layouts(file: ValidFile) -> Case:
    """Objects over several lines, or the list of records as the field of an object."""
    indent = file.random.choice([0, 2])
    if file.suffix in LISTS:
        wrapped = {file.random.choice(["data", "train", "rows"]): file.records}
        return file.with_text(json.dumps(wrapped, indent=file.random.choice([None, indent])).encode(), Expect.SAME)
    texts = [json.dumps(record, indent=indent).encode() for record in file.records]
    return file.with_text(file.random.choice([b"", b"\n", b"\n\n "]).join(texts), Expect.SAME)


@TEXT_MUTATIONS.register
def _spelling(file: ValidFile) -> Case:
    """Other escapes and white space in the record, and its fields in another order."""

    def shuffled(value: Record) -> Record:
        return dict(file.random.sample(list(value.items()), len(value)))

    record = shuffled(file.record)
    for path, value in list(nodes(record)):
        if len(path) == 2 and path[0] in ("conversations", "messages"):
            record = replace_at(record, path, shuffled(value))
    text = json.dumps(record, ensure_ascii=file.random.random() < 0.5, separators=(" ,\t", "  :"))
    return file.with_record_text(re.sub("[é北]", lambda letter: f"\\u{ord(letter[0]):04X}", text).encode(), Expect.SAME)


@TEXT_MUTATIONS.register
def _unknown_fields(file: ValidFile) -> Case:
    path = file.random_owner()
    value: Any = file.random.choice([None, True, "x\ud800", 10**30, [[]], {"role": ["system"]}, float("nan")])
    name = file.random.choice(["note", "источник", "", "a\n\x1b[31m"])
    return file.with_value(path, {**value_at(file.record, path), name: value}, Expect.SAME)


@TEXT_MUTATIONS.register
def _null_fields(file: ValidFile) -> Case:
    """Null fields in the record, a turn, a tool or a call."""
    path = file.random_owner()
    names: tuple[str, ...] = TURN_FIELDS if path else (*TURN_FIELDS, *RECORD_FIELDS)
    named = [path for path, value in nodes(file.record, inside=True) if isinstance(value, dict) and "name" in value]
    if named and file.random.random() < 0.5:
        path, names = file.random.choice(named), (*TOOL_FIELDS, *CALL_FIELDS)
    # Later formats describe a tool with all its fields.
    expect = Expect.ORACLE if path[:1] == ("tools",) else Expect.SAME
    return file.with_value(path, {**dict.fromkeys(names), **value_at(file.record, path)}, expect)


@TEXT_MUTATIONS.register
def _wrong_types(file: ValidFile) -> Case:
    names = (*TEXT_FIELDS, "input", "system", "name")
    texts = [path for path, _ in nodes(file.record) if path and path[-1] in names]
    path = file.random.choice(texts) if file.random.random() < 0.5 else file.random_path(inside=True)
    wrong = file.random.choice(WRONG_VALUES)
    is_refused = path in texts and wrong not in ("null", '""', '"x"', "[]", "{}")
    return file.with_json(path, wrong, Expect.FAULT if is_refused else Expect.ORACLE)


@TEXT_MUTATIONS.register
def _weights(file: ValidFile) -> Case:
    path = file.random_owner()
    numbers = ("true", "false", "null", "0", "0.1", "1e-3", "3", "1e39", "1e-50", "1e308", "-0.0", "-1", '"1"', "[]")
    names = file.random.sample(TURN_FIELDS[:3], file.random.randint(1, 2))
    weights = {name: json.loads(file.random.choice(numbers)) for name in names}
    return file.with_value(path, {**value_at(file.record, path), **weights})


@TEXT_MUTATIONS.register
def _numbers(file: ValidFile) -> Case:
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
    number = file.random.choice(numbers)
    text = json.dumps(f'{{"name": "weather", "arguments": {{"a": {number}}}}}')
    return file.with_json(file.random_path(inside=True), file.random.choice([number, text]))


@TEXT_MUTATIONS.register
def _nesting(file: ValidFile) -> Case:
    depth = file.random.choice([150, 400, 10_000, 100_000])
    opening, end = file.random.choice([("[", "]"), ('{"a":', "}"), ('[{"": ', "}]"), ("[", "")])
    nested = opening * depth + "1" + end * depth
    texts = [nested, json.dumps(nested), json.dumps(f'{{"name": "weather", "arguments": {nested}}}')]
    return file.with_json(file.random_path(inside=True), file.random.choice(texts))


@TEXT_MUTATIONS.register
def _control_characters(file: ValidFile) -> Case:
    letter = file.random.choice(["\0", "\x01", "\x1b", "\t", "\n"])
    return file.with_json(file.random_path(str), f'"a{letter}b"', Expect.FAULT)


@TEXT_MUTATIONS.register
def _escapes(file: ValidFile) -> Case:
    """Escaped control characters and lone surrogates, also in the name of a field."""
    text = file.random.choice([r"a\u0000b", r"\ud800", r"\udc00\ud83d x", r"\u001b[31mred", r"\u2028\u0085", r"\x41"])
    if file.random.random() < 0.2:
        return file.with_json((), f'{{"{text}": 1, ' + json.dumps(file.record)[1:])
    return file.with_json(file.random_path(str), f'"{text}"')


_HOSTILE = (
    *("<|im_end|>", "<|im_start|>", "<|im_start|>assistant\n", "<|im_end|>\n", "<|endoftext|>", "<|im_"),
    *("<think>", "</think>", "<think>\n\n</think>\n\n", "<tool_call>", "</tool_call>", "</parameter>", "<function=f>"),
    *("<tool_response>", "</tool_response>", "\n", "\n\n", "\r\n", " ", "\u3000", "\u2028", "\u200b", "\ufeff", "12"),
    *("a", "Question?", "北京", "e\u0301", "\u0301", "\u0338", "🙂", "{{name}}", "'s", "<|image_pad|>"),
)  # fmt: skip


@TEXT_MUTATIONS.register
def _hostile_texts(file: ValidFile) -> Case:
    """Texts of control tokens, thinking, calls and white space, which must stay text."""
    record, random = file.record, file.random
    texts = [path for path, value in nodes(record) if isinstance(value, str) and path and path[-1] in _CONTENTS]
    for path in random.sample(texts, min(len(texts), random.randint(1, 4))):
        record = replace_at(record, path, "".join(random.choices(_HOSTILE, k=random.randint(1, 7))))
    return file.with_value((), record)


@TEXT_MUTATIONS.register
def _arguments(file: ValidFile) -> Case:
    """Arguments of calls of any JSON type, or the text of some."""

    def any_value(depth: int = 0) -> Any:
        kind = file.random.choice(["scalar", "text", "list", "object"] if depth < 3 else ["scalar", "text"])
        if kind == "list":
            return [any_value(depth + 1) for _ in range(file.random.randrange(3))]
        if kind == "object":
            return {file.random.choice(_HOSTILE): any_value(depth + 1) for _ in range(file.random.randrange(3))}
        return file.random.choice((None, True, False, 0, -7, 1.5, 1e-07, 10**20) if kind == "scalar" else _HOSTILE)

    paths = [path for path, _ in nodes(file.record, inside=True) if path and path[-1] == "arguments"]
    if not paths:
        return _hostile_texts(file)
    value = any_value(file.random.randrange(4))
    value = json.dumps(value, ensure_ascii=False) if file.random.random() < 0.3 else value
    return file.with_value(file.random.choice(paths), value)


@TEXT_MUTATIONS.register
def _images(file: ValidFile) -> Case:
    """A message with an image, which is refused with its line."""
    images = [{"type": "image_url", "image_url": {"url": "data:,"}}, {"type": "image"}, {"image": "a.png"}]
    parts = [{"type": "text", "text": "Look:"}, file.random.choice(images)]
    texts = [path for path, _ in nodes(file.record) if path and path[-1] in _CONTENTS]
    return file.with_value(file.random.choice(texts), file.random.sample(parts, 2), Expect.FAULT)


@TEXT_MUTATIONS.register
def _empty_fields(file: ValidFile) -> Case:
    path = file.random_path(str, list, dict)
    return file.with_value(path, type(value_at(file.record, path))())


@TEXT_MUTATIONS.register
def _five_megabytes(file: ValidFile) -> Case:
    text = file.random.choice(["a", "word ", " ", "\n", "北", "1", "🙂", "e\u0301"])
    return file.with_value(file.random_path(str), text * (5_000_000 // len(text.encode())))


@TEXT_MUTATIONS.register
def _repeated_keys(file: ValidFile) -> Case:
    path = file.random.choice([path for path, value in nodes(file.record) if isinstance(value, dict) and value])
    owner = value_at(file.record, path)
    name = file.random.choice(list(owner))
    value = file.random.choice([owner[name], None, "other"])
    return file.with_json(path, f"{{{json.dumps(name)}: {json.dumps(value)}, {json.dumps(owner)[1:]}", Expect.FAULT)


@TEXT_MUTATIONS.register
def _other_fields(file: ValidFile) -> Case:
    """A field that is removed, renamed, or added with a name that means something."""
    random = file.random
    owners = [path for path, value in nodes(file.record, inside=True) if isinstance(value, dict) and value]
    tools = [path for path in owners if "description" in value_at(file.record, path)]
    path = random.choice(tools if tools and random.random() < 0.3 else owners)
    fields, value = dict(value_at(file.record, path)), json.loads(random.choice(WRONG_VALUES))
    change, other = (
        random.choice(["delete", "rename", "add"]),
        random.choice(TOOL_FIELDS if path in tools else ALL_FIELDS),
    )
    if change != "add":
        value = fields.pop(random.choice(list(fields)))
    return file.with_value(path, fields if change == "delete" else {**fields, other: value})


@TEXT_MUTATIONS.register
def _moved_items(file: ValidFile) -> Case:
    path = file.random.choice([path for path, value in nodes(file.record) if isinstance(value, list)] or [()])
    items = list(value_at(file.record, path)) if path else [file.record]
    change = file.random.choice(["delete", "double", "shuffle", "nest"])
    if items and change == "delete":
        items.pop(file.random.randrange(len(items)))
    elif items and change == "double":
        items.insert(file.random.randint(0, len(items)), file.random.choice(items))
    elif change == "shuffle":
        file.random.shuffle(items)
    else:
        items = [items]
    return file.with_value(path, items)


@TEXT_MUTATIONS.register
def _invalid_json(file: ValidFile) -> Case:
    """Text that is often mistaken for JSON."""
    text = file.record_texts()[file.index]
    wrong = [text.replace(b'"', b"'"), repr(file.record).encode(), text[:-1] + b",}", text + b",", b"[" + text + b"]"]
    wrong += [comment + text for comment in (b"// note\n", b"# note\n", b"/* note */ ")] + [text + b" // note"]
    if file.random.random() < 0.5:
        return file.with_record_text(file.random.choice(wrong), Expect.FAULT)
    words = ["None", "True", "nan", "undefined", "+1", "01", ".5", "'x'"]
    return file.with_json(file.random_path(), file.random.choice(words), Expect.FAULT)


@TEXT_MUTATIONS.register
def _two_on_a_line(file: ValidFile) -> Case:
    blank = file.random.choice([b"", b" ", b"\t"])
    return file.with_record_text(file.record_texts()[file.index] + blank + file.record_texts()[0], Expect.FAULT)


@TEXT_MUTATIONS.register
def _truncated(file: ValidFile) -> Case:
    text = file.text()
    return file.with_text(text[: file.random.randrange(len(text))])


@TEXT_MUTATIONS.register
def _bytes(file: ValidFile) -> Case:
    """Bytes that are replaced, removed or inserted anywhere."""
    text = bytearray(file.text())
    for _ in range(file.random.randint(1, 3)):
        index, byte = file.random.randrange(len(text)), file.random.choice([*b'\n"{}[]:,\\0', *range(256)])
        text[index : index + 1] = file.random.choice([bytes([byte]), b"", bytes([byte, text[index]])])
    return file.with_text(bytes(text))


@TEXT_MUTATIONS.register
def _after_the_end(file: ValidFile) -> Case:
    text = file.text().rstrip() + file.random.choice([b"", b" ", b"\n"])
    return file.with_text(
        text + file.random.choice([b"x", b"]", b",", b"{}", b"[]", b"null", b'"', b"\xff"]), Expect.FAULT
    )


@TEXT_MUTATIONS.register
def _invalid_utf8(file: ValidFile) -> Case:
    """Invalid bytes, incomplete characters and overlong encodings."""
    text = file.record_texts()[file.index]
    index = file.random.randrange(1, len(text))
    bad = file.random.choice(
        [b"\xff", b"\x80", b"\xc3", b"\xed\xa0\x80", b"\xc0\x80", b"\xf5\x80\x80\x80", b"\xf0\x9f"]
    )
    return file.with_record_text(text[:index] + bad + text[index:], Expect.FAULT)


@TEXT_MUTATIONS.register
def _encodings(file: ValidFile) -> Case:
    text = file.join([json.dumps(record, ensure_ascii=False).encode() for record in file.records]).decode()
    encoding = file.random.choice(["utf-16", "utf-32", "utf-16-le", "utf-16-be", "gb18030"])
    return file.with_text(text.encode(encoding), Expect.REFUSED if encoding in ("utf-16", "utf-32") else Expect.FAULT)


@TEXT_MUTATIONS.register
def _no_records(file: ValidFile) -> Case:
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
    return file.with_text(file.random.choice(texts).encode(), Expect.FAULT)


@TEXT_MUTATIONS.register
def _many_faults(file: ValidFile) -> Case:
    """More faults than a message shows."""
    bad = [b"{}", b"null", b'{"prompt": 1, "response": []}', b'{"messages": [{"role": "user"}]}']
    texts = [text if file.random.random() < 0.2 else file.random.choice(bad) for text in file.record_texts() * 8]
    return file.with_text(file.join([*texts, b"{}"]), Expect.FAULT)
