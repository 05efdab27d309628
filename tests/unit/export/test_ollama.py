"""The Modelfile: its template writes what the checkpoint's own chat template writes, and settings are translated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from chat.detect import family_of
from chat.families import QWEN_V1
from chat.render import render_prompt, text_of
from chat.turns import Turn
from errors import ConfigError
from export.ollama import go_template, modelfile
from tests.families import STYLES, Checkpoint, load_family
from tests.go_template import PrintedJson, render
from tests.own_templates import CHATML, OWN, tokenizer_with

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}
CALL = {"function": {"name": "weather", "arguments": {"city": "Köln"}}}
ASK = {"role": "user", "content": "How warm is it?"}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "question": [ASK],
    "own system": [{"role": "system", "content": "Be brief."}, ASK],
    "history": [ASK, {"role": "assistant", "content": "20 °C"}, {"role": "user", "content": "And {{ now }}?"}],
}
TOOL_CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "tools": [ASK],
    "tools, own system": CONVERSATIONS["own system"],
    "results": [
        ASK,
        {"role": "assistant", "content": "Both:", "tool_calls": [CALL, CALL]},
        *[{"role": "tool", "content": degrees} for degrees in ("20", "21")],
    ],
    "answer after a result": [
        ASK,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "20"},
        {"role": "assistant", "content": "20 °C"},
        ASK,
    ],
}
THOUGHT = {"role": "assistant", "content": "20 °C", "reasoning_content": "Warm."}
THINKING: dict[str, list[dict[str, Any]]] = {
    "old thinking": [ASK, THOUGHT, ASK],
    "thinking before a result": [ASK, THOUGHT | {"tool_calls": [CALL]}, {"role": "tool", "content": "20"}],
}


def call_fields(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"Function": {"Name": name, "Arguments": PrintedJson(arguments)}}


def ollama_fields(
    messages: Sequence[dict[str, Any]], default: str | None, tools: Sequence[Any] = (), think: bool | None = None
) -> dict[str, Any]:
    """Return the fields that Ollama sets for a request to a model with a default system message."""
    own = [message["content"] for message in messages if message["role"] == "system"]
    converted = [
        {
            "Role": message["role"], "Content": message["content"], "Thinking": message.get("reasoning_content", ""),
            "ToolCalls": [call_fields(**call["function"]) for call in message.get("tool_calls", ())],
        }
        for message in messages
    ]  # fmt: skip
    return {
        "System": "\n\n".join(own) if own else default or "", "Messages": converted,
        "Tools": [{"Function": PrintedJson(tool["function"])} for tool in tools],
        "Think": bool(think), "IsThinkSet": think is not None,
    }  # fmt: skip


def has_switch(checkpoint: Checkpoint) -> bool:
    return "enable_thinking" in str(checkpoint.tokenizer.chat_template)


def cases_of(checkpoint: Checkpoint) -> list[tuple[str, dict[str, Any], str]]:
    """Return cases: name, fields, and the text of the checkpoint's own chat template."""
    family, cases = checkpoint.family, []
    plain = {name: (messages, [], None) for name, messages in CONVERSATIONS.items()}
    tools = {name: (messages, [TOOL], None) for name, messages in TOOL_CONVERSATIONS.items()}
    thinking = {name: (messages, [], None) for name, messages in THINKING.items()}
    if has_switch(checkpoint):
        thinking["no thinking"] = (CONVERSATIONS["history"], [], False)
    with_thinking = thinking if family.name == "chatml-hybrid" and family.knows_thinking else {}
    for name, (messages, offered, think) in {**plain, **(tools if family.tool_form else {}), **with_thinking}.items():
        fields = ollama_fields(messages, family.default_system, offered, think)
        expected = checkpoint.tokenizer.apply_chat_template(
            messages, tools=offered or None, tokenize=False, add_generation_prompt=True,
            **({} if think is None else {"enable_thinking": think}),
        )  # fmt: skip
        cases.append((name, fields, str(expected)))
    return cases


@pytest.mark.parametrize("name", sorted(STYLES))
def test_template_writes_what_the_chat_template_writes(shared: Path, name: str) -> None:
    checkpoint = load_family(shared, name)
    template = go_template(checkpoint.family, has_switch(checkpoint))
    for case, fields, expected in cases_of(checkpoint):
        assert render(template, fields) == expected, case


def test_format_that_is_not_known_is_refused(shared: Path) -> None:
    families = [load_family(shared, "qwen3_6").family]
    families += [family_of(tokenizer_with(each)) for each in (OWN["labels"], CHATML["other names"], CHATML["trimmed"])]
    for family in families:
        reason = r"(trims texts|of this checkpoint cannot be)"
        with pytest.raises(ConfigError, match=rf"--modelfile: the chat format '{family.name}' {reason}"):
            go_template(family)
    assert "Be kind" not in go_template(family_of(tokenizer_with(CHATML["default system"]))), "it is SYSTEM's"


def test_template_of_qwen_v1_writes_its_prompt() -> None:
    messages = CONVERSATIONS["history"]
    turns = [Turn(message["role"], message["content"]) for message in messages]
    found = render(go_template(QWEN_V1), ollama_fields(messages, QWEN_V1.default_system))
    assert found == text_of(render_prompt(turns, QWEN_V1))


def test_started_answer_is_continued() -> None:
    messages = [ASK, {"role": "assistant", "content": "It is"}]
    assert render(go_template(QWEN_V1), ollama_fields(messages, None)).endswith("<|im_start|>assistant\nIt is")


def test_settings_are_those_of_the_checkpoint() -> None:
    text = modelfile(QWEN_V1, None, GenerationConfig(do_sample=True, temperature=0.7, top_k=20, top_p=0.8), "m.gguf")
    lines = text.splitlines()
    assert lines[0] == "FROM ./m.gguf" and 'SYSTEM """You are a helpful assistant."""' in lines
    assert 'PARAMETER stop "<|im_end|>"' in lines and 'PARAMETER stop "<|endoftext|>"' in lines
    values = dict(line.split()[1:] for line in lines if line.startswith("PARAMETER") and "stop" not in line)
    assert values == {"temperature": "0.7", "top_k": "20", "top_p": "0.8", "min_p": "0.0", "repeat_penalty": "1.0"}


def test_greedy_checkpoint_stays_greedy() -> None:
    text = modelfile(QWEN_V1, None, GenerationConfig(repetition_penalty=1.05), "m.gguf")
    assert text.endswith("PARAMETER temperature 0.0\nPARAMETER repeat_penalty 1.05\n")


def test_system_message_that_would_end_its_quotes_is_refused() -> None:
    with pytest.raises(ConfigError, match="quotes that a Modelfile cannot contain"):
        modelfile(replace(QWEN_V1, default_system='Say """ and PARAMETER'), None, GenerationConfig(), "m.gguf")
