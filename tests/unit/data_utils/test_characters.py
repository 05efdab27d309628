"""Characters of records that few texts have: half of a surrogate pair is replaced, null characters are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chat.families import QWEN_V1
from data_utils.encode import EncodeOptions, Encoder
from qwen_model.tokenization_qwen import QWenTokenizer
from tests.data import load
from tests.models import TINY

HALF = "\ud83d"
QUESTION, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
TOOL = {"type": "function", "function": {"name": "weather", "description": f"Warmth {HALF}", "parameters": {}}}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": HALF}}}


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(QWenTokenizer.from_pretrained(TINY), QWEN_V1, EncodeOptions())


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, records)))  # escapes what is not ASCII
    return path


def test_half_of_a_surrogate_pair_is_replaced_as_in_the_original(encoder: Encoder, tmp_path: Path) -> None:
    conversation = {"messages": [QUESTION, {**ANSWER, "content": f"Hello {HALF} \U0001f642"}]}
    calls = {"messages": [QUESTION, {**ANSWER, "tool_calls": [CALL]}], "tools": [TOOL]}
    examples = load(encoder, write(tmp_path / "a.jsonl", conversation, calls))
    assert "assistant\nHello \ufffd \U0001f642<|im_end|>" in encoder.decode(examples[0]["input_ids"])
    assert "Warmth \ufffd" in encoder.decode(examples[1]["input_ids"])
    [text] = load(encoder, write(tmp_path / "b.jsonl", {"text": "a \udc00"}))
    assert encoder.decode(text["input_ids"]) == "a \ufffd<|endoftext|>"


def test_null_characters_are_kept(encoder: Encoder, tmp_path: Path) -> None:
    conversation = {"messages": [QUESTION, {**ANSWER, "content": "a\0b\0"}]}
    [example] = load(encoder, write(tmp_path / "a.jsonl", conversation))
    assert "assistant\na\0b\0<|im_end|>" in encoder.decode(example["input_ids"])
    [text] = load(encoder, write(tmp_path / "b.jsonl", {"text": "a\0b"}))
    assert encoder.decode(text["input_ids"]) == "a\0b<|endoftext|>"
