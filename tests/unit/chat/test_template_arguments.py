"""Arguments that a chat template reads, and those that it refuses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from chat.template_arguments import reads_argument, refused_argument, template_text


@pytest.mark.parametrize(
    ("template", "is_read"),
    [
        ("{% if enable_thinking is false %}", True),
        ("{%- if\nenable_thinking%}", True),
        ("{{ kwargs['enable_thinking'] }}", True),
        ("{% set enable_thinking_default = true %}{{ my_enable_thinking }}", False),
        ("", False),
    ],
)
def test_arguments_are_whole_words(template: str, is_read: bool) -> None:
    assert reads_argument(template, "enable_thinking") is is_read
    named = SimpleNamespace(chat_template={"default": template, "tool_use": "{{ enable_thinking }}"})
    assert template_text(named) == template


def test_refused_argument_is_a_text_wherever_it_stands() -> None:
    assert refused_argument({"reasoning_effort": "high", "preserve_thinking": True}) == "reasoning_effort"
    assert refused_argument({"enable_thinking": True, "preserve_thinking": True}) == "preserve_thinking"
    assert template_text(SimpleNamespace()) == template_text(SimpleNamespace(chat_template=None)) == ""
