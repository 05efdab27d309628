"""Characters of records that few texts have: refused with their place, or kept exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chat.families import QWEN_V1
from data_utils.encode import EncodeOptions, Encoder
from errors import DataError
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


@pytest.mark.parametrize(
    ("record", "owner"),
    [
        ({"messages": [QUESTION, {**ANSWER, "content": f"Hello {HALF} é"}]}, "turn 2"),
        ({"messages": [QUESTION, {**ANSWER, "tool_calls": [CALL]}]}, "turn 2"),
        ({"messages": [QUESTION, ANSWER], "tools": [TOOL]}, "the description of tools"),
    ],
)
def test_half_of_a_surrogate_pair_is_refused_with_its_place(
    record: dict[str, Any], owner: str, encoder: Encoder, tmp_path: Path
) -> None:
    good = {"messages": [QUESTION, {**ANSWER, "content": "\U0001f642"}]}  # both halves are a character
    path = write(tmp_path / "a.jsonl", good, record)
    with pytest.raises(DataError) as caught:
        load(encoder, path)
    character = repr(HALF)
    assert str(caught.value) == (
        f"{path}:2: {owner} contains {character}, half of a surrogate pair, which is no character. "
        "Write the whole character, or leave the record out"
    )
    assert len(load(encoder, path, skip_bad=True)) == 1


def test_half_of_a_surrogate_pair_in_a_text_is_refused(encoder: Encoder, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:1: the text contains '\\udc00', half of"):
        load(encoder, write(tmp_path / "a.jsonl", {"text": "a \udc00"}))


def test_null_characters_are_kept(encoder: Encoder, tmp_path: Path) -> None:
    conversation = {"messages": [QUESTION, {**ANSWER, "content": "a\0b\0"}]}
    [example] = load(encoder, write(tmp_path / "a.jsonl", conversation))
    assert "assistant\na\0b\0<|im_end|>" in encoder.decode(example["input_ids"])
    [text] = load(encoder, write(tmp_path / "b.jsonl", {"text": "a\0b"}))
    assert encoder.decode(text["input_ids"]) == "a\0b<|endoftext|>"
