"""The prompts that merged models are compared on."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from export.verify.prompts import prompt_ids
from loading.tokenizer import load_tokenizer
from tests.verification import make_base


@pytest.mark.parametrize("family", ["qwen", "qwen2", "qwen3"])
def test_prompts_are_rendered_as_conversations(tmp_path: Path, family: str) -> None:
    base = make_base(tmp_path / "base", family)
    tokenizer = load_tokenizer(base, "base")
    ids = prompt_ids(base, 960)
    assert len(ids) == 12 and all(10 <= len(each) <= 64 for each in ids)
    text = tokenizer.decode(ids[4])
    assert "<|im_start|>user\n早上喝" in text
    ends = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert any(ends in each for each in ids)


@pytest.mark.parametrize("lost", [True, False])
def test_pseudo_random_ids_without_a_usable_tokenizer(
    tmp_path: Path, lost: bool, caplog: pytest.LogCaptureFixture
) -> None:
    base = make_base(tmp_path / "base", "qwen2")
    if lost:
        for file in base.glob("token*"):
            file.unlink()
    vocabulary = 768 if lost else 100
    with caplog.at_level(logging.WARNING):
        ids = prompt_ids(base, vocabulary)
    assert "cannot be used" in caplog.text and "random tokens" in caplog.text
    assert ids == prompt_ids(base, vocabulary) and len(ids) == 12
    assert all(0 <= id_ < vocabulary for each in ids for id_ in each)
