"""Records of every format for tests."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import strategies as st

from chat.turns import Turn
from data_utils.formats import FORMATS, recognise
from data_utils.schema import Conversation
from errors import DataError

WHERE = "chats.jsonl:7"
HI = {"from": "user", "value": "Hi"}
HELLO = {"from": "assistant", "value": "Hello!"}
ASK = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello!"}
TURNS = (Turn("user", "Hi"), Turn("assistant", "Hello!"))
TOOL = {"name": "weather", "description": "Weather of a city", "parameters": {"type": "object", "properties": {}}}
ARGUMENTS = {"b": None, "a": [[1, [2.50]], {}], "f": 1e-07, "one": 1.0, "big": 12345678901234567890123, "ü": "🙂\n\"'"}


def parse(record: object, name: str | None = None) -> Conversation:
    """Parse a record in the format ``name``, by default in the recognised one."""
    return (FORMATS[name] if name else recognise(record, WHERE)).parse(record, WHERE)


def call_text(*calls: dict[str, Any]) -> str:
    return json.dumps(calls[0] if len(calls) == 1 else calls, ensure_ascii=False)


def called(*calls: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"from": "function_call", "value": call_text(*calls), **fields}


def openai_call(name: str, arguments: Any, id_: str | None = None) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return call if id_ is None else {"id": id_, **call}


def result(content: str, id_: object = None) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": id_}


def two_calls(*results: dict[str, Any], ids: tuple[Any, Any] = ("1", "2")) -> dict[str, Any]:
    calls = [{"id": id_, **openai_call(name, "{}")} for name, id_ in zip("ab", ids, strict=True)]
    return {"messages": [ASK, {"role": "assistant", "tool_calls": calls}, *results, ANSWER]}


EVERY_FORMAT = {
    "conversations": {"conversations": [HI, HELLO]},
    "messages": {"messages": [ASK, ANSWER]},
    "alpaca": {"instruction": "Hi", "output": "Hello!"},
    "pairs": {"prompt": "Hi", "response": "Hello!"},
}

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["\ud800", "\0", "[]"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def refused(record: object, name: str, message: str) -> None:
    """Check that the format ``name`` refuses a record with a one-line message that starts with this text."""
    with pytest.raises(DataError, match="^" + re.escape(f"{WHERE}: {message}")) as error:
        FORMATS[name].parse(record, WHERE)
    text = str(error.value)
    assert f" (read as {name})" in text and text.isprintable() and error.value.where == WHERE
