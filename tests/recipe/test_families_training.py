"""Qwen2.5 and Qwen3 checkpoints through the same commands, with their own chat templates: train, merge, ask."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import finetune
from data_utils.encode import EncodeOptions, Encoder
from loading.checkpoint import load_checkpoint
from scripts import ask
from tests.commands import PLAIN, finetune_here, logged_losses, names_in, read_json, run_all, run_here, run_well
from tests.data import load
from tests.models import CONVERSATIONS, write_conversations, write_later_checkpoint

FAMILIES = {"qwen2": "qwen2_5", "qwen3": "qwen3"}
MAX_STEPS = {"qwen3-lora": 150}  # the model could not answer after 60 as the others do
QUESTION, ANSWER = CONVERSATIONS[1][0][1], CONVERSATIONS[1][1][1]
PROMPT = ("--thinking", "off")  # by which answers without thinking are trained
IDS = torch.tensor([[701, 39, 72, 702, 198, 5, 6, 7, 701, 702, 300, 400]])


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> dict[str, Path]:
    """Write a tiny random checkpoint of each family with its official chat template."""
    folder = tmp_path_factory.mktemp("bases")
    return {
        model_type: write_later_checkpoint(
            folder / model_type, model_type, (shared / "families" / "templates" / f"{template}.jinja").read_text()
        )
        for model_type, template in FAMILIES.items()
    }


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, bases: dict[str, Path]) -> dict[str, Path]:
    """Train both families by LoRA and in full until they repeat the conversations."""
    folder = tmp_path_factory.mktemp("outputs")
    data = write_conversations(folder / "train.json")
    modes = {
        "lora": ["--use_lora", "--lora_dropout", 0, "--lora_alpha", 64, "--learning_rate", 2e-2],
        "full": ["--learning_rate", 1e-2],
    }
    arguments: dict[str, list[object]] = {
        f"{model_type}-{mode}": [
            *PLAIN, "--model_name_or_path", bases[model_type], "--data_path", data, "--output_dir",
            folder / f"{model_type}-{mode}", "--max_steps", MAX_STEPS.get(f"{model_type}-{mode}", 60),
            "--logging_steps", 1, "--save_strategy", "no",
            *modes[mode],
        ]
        for model_type in FAMILIES for mode in modes
    }  # fmt: skip
    as_commands = ["qwen2-lora", "qwen3-full"]
    for result in run_all([["finetune.py", *arguments[name]] for name in as_commands]):
        assert result.returncode == 0, result.stderr
    for name in arguments.keys() - as_commands:
        finetune_here(*arguments[name])
    return {name: folder / name for name in arguments}


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_loss_falls(outputs: dict[str, Path], model_type: str, mode: str) -> None:
    output = outputs[f"{model_type}-{mode}"]
    losses = logged_losses(output)
    assert losses[0] > 6
    # LoRA does not train the small random head, whose logits separate 768 tokens less clearly.
    assert losses[-1] < (4.5 if mode == "lora" else 0.5)
    summary = read_json(output / "run_summary.json")
    assert (summary["model_type"], summary["mode"]) == (model_type, mode)
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json"} < set(names_in(output))
    assert read_json(output / "generation_config.json")["eos_token_id"] == [702, 700]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_merged_adapter_equals_base_with_adapter(
    outputs: dict[str, Path], bases: dict[str, Path], tmp_path: Path, model_type: str
) -> None:
    adapter = outputs[f"{model_type}-lora"]
    run_well("merge_lora.py", "--adapter", adapter, "--output", tmp_path / "merged")
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases[model_type]), adapter)
    with torch.no_grad():
        expected = tuned.eval()(input_ids=IDS).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(input_ids=IDS).logits
    assert (merged - expected).abs().max() <= 1e-4
    result = run_well("-m", "scripts.ask", "--model_name_or_path", tmp_path / "merged", *PROMPT, QUESTION)
    assert result.stdout == f"{ANSWER}\n"


def test_adapters_and_full_weights_answer_as_trained(
    outputs: dict[str, Path], bases: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    for arguments in (
        [bases["qwen2"], "--adapter", outputs["qwen2-lora"]],
        [bases["qwen3"], "--adapter", outputs["qwen3-lora"]],
        [outputs["qwen2-full"]],
        [outputs["qwen3-full"]],
    ):
        assert run_here(ask.main, "scripts.ask", ["--model_name_or_path", *arguments, *PROMPT, QUESTION]) == 0
        assert capfd.readouterr().out == f"{ANSWER}\n"


@pytest.mark.parametrize("model_type", FAMILIES)
def test_training_text_is_that_of_the_checkpoint_s_chat_template(
    bases: dict[str, Path], tmp_path: Path, model_type: str
) -> None:
    checkpoint = load_checkpoint(str(bases[model_type]))
    data = write_conversations(tmp_path / "train.json")
    encoder = Encoder(checkpoint.tokenizer, checkpoint.family, EncodeOptions())
    tokenizer = AutoTokenizer.from_pretrained(bases[model_type])
    for turns, example in zip(CONVERSATIONS, load(encoder, data), strict=True):
        messages = [{"role": role, "content": content} for role, content in turns]
        assert tokenizer.decode(example["input_ids"]) == tokenizer.apply_chat_template(messages, tokenize=False)
        trained = [id_ for id_, label in zip(example["input_ids"], example["labels"], strict=True) if label != -100]
        assert tokenizer.decode(trained).count("<|im_end|>\n") == sum(role == "assistant" for role, _ in turns) - (
            turns[0][0] == "assistant"  # these templates have no prompt for an answer that opens the conversation
        )


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"city": "string"}}}]
ASK, THOUGHT = {"role": "user", "content": "Weather?"}, {"reasoning_content": "I should look."}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm"}}}
STEPS = [
    ASK,
    {"role": "assistant", "content": "", "tool_calls": [CALL], **THOUGHT},
    {"role": "tool", "content": "22"},
    {"role": "assistant", "content": "Warm.", **THOUGHT},
]


def test_tools_and_thinking_follow_the_chat_template(bases: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = load_checkpoint(str(bases["qwen3"]))
    data = tmp_path / "steps.jsonl"
    data.write_text(json.dumps({"messages": STEPS, "tools": TOOLS}) + "\n")
    [example] = load(Encoder(checkpoint.tokenizer, checkpoint.family, EncodeOptions()), data)
    tokenizer = AutoTokenizer.from_pretrained(bases["qwen3"])
    text = tokenizer.apply_chat_template(STEPS, tools=TOOLS, tokenize=False)
    assert tokenizer.decode(example["input_ids"]) == text
    trained = [id_ for id_, label in zip(example["input_ids"], example["labels"], strict=True) if label != -100]
    thought = "<think>\nI should look.\n</think>\n\n"
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'
    assert tokenizer.decode(trained) == f"{thought}{call}<|im_end|>\n{thought}Warm.<|im_end|>\n"


def test_thinking_is_refused_if_the_chat_template_cannot_render_it(
    bases: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "steps.jsonl"
    data.write_text(json.dumps({"messages": STEPS, "tools": TOOLS}) + "\n")
    arguments = ["--model_name_or_path", bases["qwen2"], "--data_path", data, "--output_dir", tmp_path / "out"]
    assert run_here(finetune.main, "finetune.py", [*arguments, "--disable_tqdm", "True"]) == 2
    assert capfd.readouterr().err.endswith(
        f"{data}:1: turn 2 has a field with thinking, which the chat format 'chatml' does not support. "
        "Remove the field, leave the record out, or remove all thinking with --thinking off\n"
    )
    assert not (tmp_path / "out").exists()
