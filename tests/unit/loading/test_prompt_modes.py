"""Chat formats behind prompts with thinking and without, and with arguments of the template."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from chat.families import EMPTY_THOUGHT
from errors import ConfigError
from loading.prompt_modes import prompt_families
from tests.families import load_family


def checkpoint_of(shared: Path, name: str) -> Any:
    loaded = load_family(shared, name)
    return SimpleNamespace(model_type="qwen3", tokenizer=loaded.tokenizer, family=loaded.family)


def suffixes(shared: Path, name: str, thinking: Any, **arguments: Any) -> list[str]:
    return [family.prompt_suffix for family in prompt_families(checkpoint_of(shared, name), thinking, arguments)]


def test_prompts_of_both_modes_are_those_of_the_switch(shared: Path) -> None:
    assert suffixes(shared, "qwen3", "auto") == ["", EMPTY_THOUGHT]
    assert suffixes(shared, "qwen3_5_nothink", "auto") == ["<think>\n", EMPTY_THOUGHT]
    assert suffixes(shared, "qwen3_5_nothink", "off") == [EMPTY_THOUGHT] * 2
    assert suffixes(shared, "qwen3_5_nothink", "on") == ["<think>\n"] * 2
    assert suffixes(shared, "qwen3_5_nothink", None) == [EMPTY_THOUGHT] * 2
    assert suffixes(shared, "qwen3_thinking_2507", "auto") == ["<think>\n"] * 2
    assert suffixes(shared, "qwen2_5", "off") == ["", ""]


def test_arguments_change_the_format_or_are_refused_by_name(shared: Path) -> None:
    kept, _ = prompt_families(checkpoint_of(shared, "qwen3_6"), "auto", {"preserve_thinking": True})
    assert kept.thinking == "kept"
    checkpoint = checkpoint_of(shared, "qwen3_8")
    thinks, plain = prompt_families(checkpoint, "auto", {"reasoning_effort": "low"})
    assert "low" in thinks.instructions.lower() and not plain.instructions
    for name, thinking, arguments, message in (
        (
            "qwen3_8",
            "auto",
            {"reasoning_effort": "high"},
            "^--reasoning_effort high: the checkpoint's chat template fails",
        ),
        (
            "qwen3",
            "auto",
            {"reasoning_effort": "low"},
            "^--reasoning_effort low: the checkpoint's chat template has no",
        ),
        (
            "qwen3",
            "auto",
            {"preserve_thinking": True},
            "^--preserve_thinking on: the checkpoint's chat template has no",
        ),
        ("qwen2_5", "on", {}, "^--thinking on: the chat format 'chatml' has no thinking"),
        ("qwen3_thinking_2507", "off", {}, "^--thinking off: every answer of this checkpoint begins with thinking"),
    ):
        with pytest.raises(ConfigError, match=message):
            prompt_families(checkpoint_of(shared, name), thinking, arguments)  # type: ignore[arg-type]
