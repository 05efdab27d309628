"""Options of a request become the prompt that the official template writes with the same arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from unicodedata import normalize

import pytest

from chat.families import QWEN_V1, Family
from loading.chat_family import chat_family
from serving.formats import Formats, TemplateOptions
from serving.rendering import render_turns
from serving.requests import RequestError
from tests.families import Checkpoint, left_out, load_family, turns_of

Load = Callable[[str], tuple[Checkpoint, Formats]]


@pytest.fixture
def load(shared: Path) -> Load:
    def load_one(name: str) -> tuple[Checkpoint, Formats]:
        checkpoint = load_family(shared, name)
        detect = partial(chat_family, "qwen3", checkpoint.tokenizer)
        return checkpoint, Formats(checkpoint.family, detect, str(checkpoint.tokenizer.chat_template))

    return load_one


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen3", TemplateOptions(enable_thinking=False)),
        ("qwen3", TemplateOptions(enable_thinking=True, preserve_thinking=False)),
        ("qwen3_5_nothink", TemplateOptions(enable_thinking=True)),
        ("qwen3_6", TemplateOptions(enable_thinking=False, preserve_thinking=True)),
        ("qwen3_8", TemplateOptions(preserve_thinking=False, reasoning_effort="low")),
        ("qwen3_8", TemplateOptions(enable_thinking=False, reasoning_effort="high")),
    ],
)
def test_prompts_are_those_of_the_official_template(load: Load, name: str, options: TemplateOptions) -> None:
    checkpoint, formats = load(name)
    family, compared = formats.family(options), 0
    arguments = {key: value for key, value in vars(options).items() if value is not None}
    for case in checkpoint.cases:
        if left_out(case, checkpoint) or case["messages"][-1].get("tool_calls"):
            continue
        ids = render_turns(turns_of(case), case["tools"] or (), family, checkpoint.tokenizer)
        expected = checkpoint.tokenizer.apply_chat_template(
            case["messages"], tools=case["tools"], tokenize=False, add_generation_prompt=True, **arguments
        )
        assert checkpoint.tokenizer.decode(ids) == normalize("NFC", expected), case["name"]
        compared += 1
    assert compared > 15


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("qwen2_5", {"enable_thinking": True}, "enable_thinking: true is not possible: this model never thinks"),
        ("qwen3_thinking_2507", {"enable_thinking": False}, "enable_thinking: .* this model always thinks"),
        ("qwen3_instruct_2507_launch", {"enable_thinking": False}, "enable_thinking: .* no prompt without thinking"),
        ("qwen3_5_think", {"preserve_thinking": True}, "preserve_thinking: .* loses earlier thinking"),
        ("qwen3_6", {"reasoning_effort": "low"}, "reasoning_effort: .* no such setting"),
        ("qwen3_8", {"reasoning_effort": "high"}, 'reasoning_effort: "high" .* Supported types are xhigh'),
    ],
)
def test_option_that_a_template_has_not_is_refused_by_name(
    load: Load, name: str, options: dict[str, bool | str], message: str
) -> None:
    _, formats = load(name)
    for _ in range(2):
        with pytest.raises(RequestError, match=message) as caught:
            formats.family(TemplateOptions(**options))  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


def test_format_is_detected_once() -> None:
    detected: list[dict[str, bool]] = []

    def detect(**arguments: bool) -> Family:
        detected.append(arguments)
        return Family("other", thinking="kept")

    formats = Formats(QWEN_V1, detect, "preserve_thinking")
    assert formats.family(TemplateOptions()) is QWEN_V1
    kept = formats.family(TemplateOptions(preserve_thinking=True))
    assert kept is formats.family(TemplateOptions(preserve_thinking=True)) and kept.name == "other"
    assert detected == [{"preserve_thinking": True}]
