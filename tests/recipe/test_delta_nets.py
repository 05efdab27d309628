"""A whole folder of Qwen3.6 with its own chat template through the commands: trained, resumed, merged, asked.

transformers asks, with tools and with thinking, as a server that knows nothing of this toolkit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from chat.reading import opening_of, read_answer
from chat.turns import Turn
from loading.checkpoint import load_checkpoint
from loading.prompt_modes import prompt_families
from scripts import ask
from tests.commands import PLAIN, finetune_here, logged_losses, read_json, run_here
from tests.merging import merge_well
from tests.models import CONVERSATIONS, write_conversations
from tests.whole_folders import write_whole_folder

QUESTION, ANSWER = CONVERSATIONS[1][0][1], CONVERSATIONS[1][1][1]

TYPES = {"city": {"type": "string"}, "days": {"type": "integer"}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": TYPES}}}]
ARGUMENTS = {"city": 'Ulm, "Mitte"', "days": 2}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
TOOL_CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "Will it rain in Ulm?"},
    {"role": "assistant", "content": "I look.", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "rain: 0 mm"},
    {"role": "assistant", "content": "No, it stays dry."},
]
SUM = {"role": "user", "content": "6 x 7?"}
WITH_THOUGHT = {"role": "assistant", "content": "It is 42.", "reasoning_content": "Six sevens are 42."}
WITHOUT_THOUGHT = {"role": "assistant", "content": "42"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Path:
    template = (shared / "families" / "templates" / "qwen3_6.jinja").read_text(encoding="utf-8")
    return write_whole_folder(tmp_path_factory.mktemp("base") / "model", template)


def train(base: Path, output: Path, *flags: object) -> Path:
    finetune_here(
        *PLAIN, "--model_name_or_path", base, "--output_dir", output, "--logging_steps", 1, "--learning_rate", 1e-2,
        *flags,
    )  # fmt: skip
    return output


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train an adapter on plain conversations, one with a call, and one question with and without thinking."""
    folder = tmp_path_factory.mktemp("adapter")
    plain = write_conversations(folder / "plain.json", CONVERSATIONS[:4])
    records: list[dict[str, Any]] = [{"messages": TOOL_CHAT, "tools": TOOLS}]
    (folder / "tools.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    records = [{"messages": [SUM, answer]} for answer in (WITH_THOUGHT, WITHOUT_THOUGHT)]
    (folder / "thoughts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    data = (plain, folder / "tools.jsonl", folder / "thoughts.jsonl")
    return train(
        base, folder / "out", "--data_path", *data, "--use_lora", "--lora_dropout", 0, "--lora_alpha", 64,
        "--trainable_embeddings", "full", "--max_steps", 60, "--save_strategy", "no",
    )  # fmt: skip


@pytest.fixture(scope="module")
def merged(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "model"
    assert "verified:" in merge_well("--adapter", adapter, "--output", folder).stdout
    return folder


def test_an_adapter_learns_and_answers(base: Path, adapter: Path, capfd: pytest.CaptureFixture[str]) -> None:
    losses = logged_losses(adapter)
    assert losses[0] > 6 and losses[-1] < 0.5
    assert read_json(adapter / "run_summary.json")["model_type"] == "qwen3_5_text"
    asked = ["--model_name_or_path", base, "--adapter", adapter, "--thinking", "off", QUESTION]
    assert run_here(ask.main, "scripts.ask", asked) == 0
    assert capfd.readouterr().out == f"{ANSWER}\n"


THINKING, PLAIN_PROMPT = {"enable_thinking": True}, {"enable_thinking": False}


@pytest.mark.parametrize(
    ("messages", "options", "expected"),
    [
        ([{"role": "user", "content": QUESTION}], PLAIN_PROMPT, Turn("assistant", ANSWER)),
        ([SUM], THINKING, Turn("assistant", "It is 42.", thinking="Six sevens are 42.")),
        ([SUM], {}, Turn("assistant", "It is 42.", thinking="Six sevens are 42.")),
        ([SUM], PLAIN_PROMPT, Turn("assistant", "42")),
        (TOOL_CHAT[:1], {"tools": TOOLS, **PLAIN_PROMPT}, None),
        (TOOL_CHAT[:3], {"tools": TOOLS, **PLAIN_PROMPT}, Turn("assistant", "No, it stays dry.")),
    ],
    ids=["plain", "thinking", "default", "without thinking", "call", "after the result"],
)
def test_transformers_gets_what_was_taught(
    merged: Path, messages: list[dict[str, Any]], options: dict[str, Any], expected: Turn | None
) -> None:
    """The prompt is that of the template, the answer is parsed as the server here does."""
    tokenizer, model = AutoTokenizer.from_pretrained(merged), AutoModelForCausalLM.from_pretrained(merged)
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt", **options
    )
    stops = GenerationConfig.from_pretrained(merged).eos_token_id
    greedy = GenerationConfig(max_new_tokens=100, do_sample=False, eos_token_id=stops, pad_token_id=stops[-1])
    output = model.generate(**prompt, generation_config=greedy)
    text = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert text.endswith("<|im_end|>")
    tools = options.get("tools", ())
    thinking = "off" if options.get("enable_thinking") is False else "on"
    family, _ = prompt_families(load_checkpoint(str(merged)), thinking, {})
    opening = opening_of(family, bool(tools), messages[-1]["role"] == "tool")
    turn = read_answer(text.removesuffix("<|im_end|>"), family, tools, opening)
    if expected is not None:
        assert turn == expected
    else:
        [call] = turn.calls
        assert (turn.content, call.name, json.loads(call.arguments)) == ("I look.", "weather", ARGUMENTS)


STEPS, SAVED = 6, 4


@pytest.mark.parametrize(
    "flags",
    [
        ("--per_device_train_batch_size", 3),
        ("--packing", "--model_max_length", 120, "--per_device_train_batch_size", 1),
    ],
    ids=["unpacked", "packed"],
)
def test_a_resumed_run_of_split_conversations_ends_with_the_same_bits(
    base: Path, tmp_path: Path, flags: tuple[object, ...]
) -> None:
    """Full training: chats of two and three questions are split into samples, of which a step takes a part."""
    data = write_conversations(tmp_path / "train.json")
    flags = (
        "--data_path", data, "--max_steps", STEPS, "--save_strategy", "steps", "--save_steps", SAVED,
        "--eval_data_path", data, "--eval_strategy", "steps", "--eval_steps", STEPS, "--gradient_checkpointing", "True",
        *flags,
    )  # fmt: skip
    whole = train(base, tmp_path / "whole", *flags)
    report = read_json(whole / "data_receipt.json")["train"]
    assert (report["kept"], report["samples"]) == (8, 11)
    resumed = train(base, tmp_path / "resumed", *flags, "--resume_from_checkpoint", whole / f"checkpoint-{SAVED}")
    assert logged_losses(resumed) == logged_losses(whole)[SAVED:]
    tensors, expected = (load_file(folder / "model.safetensors") for folder in (resumed, whole))
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
