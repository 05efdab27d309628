"""python -m scripts.convert_layout: round trips of whole folders, and refused inputs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

from checkpoints.shards import fingerprint
from loading.adapters import embeddings_policy
from loading.checkpoint import load_checkpoint, load_model
from qwen_model.modeling_qwen import QWenLMHeadModel
from qwen_model.register import register_qwen
from scripts.convert_layout import main
from tests.commands import finetune_here, names_in, read_json, run_here, run_well
from tests.golden import LOGITS_ATOL, assert_close
from tests.merging import merge_well
from tests.models import TINY, change_json, copy_checkpoint, write_conversations, write_later_checkpoint
from tests.quantized import write_gptq

IDS = torch.arange(40).view(2, 20)


def convert(*arguments: object) -> int:
    return run_here(main, "scripts.convert_layout", arguments)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@torch.no_grad()
def test_checkpoint_round_trip(tmp_path: Path) -> None:
    source = copy_checkpoint(tmp_path / "qwen", chat_format="raw")
    (source / "LICENSE").write_text("a licence")
    before = contents(source)
    there, back = tmp_path / "there", tmp_path / "back"
    result = run_well("-m", "scripts.convert_layout", source, there, "--max_shard_size", "50KB", is_new=True)
    assert "qwen -> qwen2" in result.stdout and "64 tokens" in result.stderr
    assert "torchao" not in result.stderr, "libraries are quiet before they are imported"
    assert contents(source) == before
    assert len([name for name in names_in(there) if name.endswith(".safetensors")]) > 2
    assert (there / "LICENSE").read_text() == "a licence"
    assert read_json(there / "generation_config.json")["eos_token_id"] == [702, 700]
    assert "chat_format" not in read_json(there / "generation_config.json")
    origin = {"layout": "qwen", "fingerprint": fingerprint(source)}
    assert read_json(there / "config.json")["converted_from"] == origin

    model = AutoModelForCausalLM.from_pretrained(there, dtype=torch.float32)
    assert isinstance(model, Qwen2ForCausalLM)
    expected = QWenLMHeadModel.from_pretrained(source, dtype=torch.float32).eval()(IDS).logits
    assert_close(model(IDS).logits, expected, LOGITS_ATOL)
    assert AutoTokenizer.from_pretrained(there)("Hello 你好").input_ids
    assert load_checkpoint(str(there)).family.default_system == "You are a helpful assistant."

    assert convert(there, back) == 0
    stored, restored = load_file(source / "model.safetensors"), load_file(back / "model.safetensors")
    assert stored.keys() == restored.keys() and all(torch.equal(restored[name], stored[name]) for name in stored)
    assert (back / "qwen.tiktoken").read_bytes() == (source / "qwen.tiktoken").read_bytes()
    assert not (back / "tokenizer.json").exists()
    assert load_checkpoint(str(back)).chat_format == "raw"


@pytest.mark.parametrize("chat_format", ["raw", "chatml"])
def test_control_tokens_are_trained_until_a_base_model_was_tuned(tmp_path: Path, chat_format: str) -> None:
    """trainable_embeddings=auto trains the embeddings of a converted base model, but not of a tuned one."""
    source = copy_checkpoint(tmp_path / "qwen", chat_format=chat_format)
    base, tuned, merged = (tmp_path / name for name in ("base", "tuned", "merged"))
    assert convert(source, base) == 0
    arguments = ["--data_path", write_conversations(tmp_path / "data.json"), "--max_steps", 1]
    finetune_here("--model_name_or_path", base, "--output_dir", tuned / "lora", "--use_lora", *arguments)
    finetune_here("--model_name_or_path", base, "--output_dir", tuned / "full", *arguments)
    trained = read_json(tuned / "lora" / "run_summary.json")["trainable_embeddings"]["mode"]
    assert trained == {"raw": "full", "chatml": "none"}[chat_format]
    merge_well("--adapter", tuned / "lora", "--output", merged)
    for folder in (tuned / "full", merged):
        assert embeddings_policy("auto", load_checkpoint(str(folder))).mode == "none"


@torch.no_grad()
def test_quantised_checkpoint(tmp_path: Path) -> None:
    weights = write_gptq(TINY, tmp_path / "qwen", config="quantize_config.json", file_name="gptq_model-4bit-32g")
    assert convert(tmp_path / "qwen", tmp_path / "there") == 0
    models = [load_model(load_checkpoint(str(tmp_path / name)), torch.float32) for name in ("qwen", "there")]
    assert_close(models[1](IDS).logits, models[0](IDS).logits, LOGITS_ATOL)
    # --dtype dequantises it.
    assert convert(tmp_path / "qwen", tmp_path / "float", "--dtype", "fp32") == 0
    config, tensors = read_json(tmp_path / "float" / "config.json"), load_file(tmp_path / "float" / "model.safetensors")
    assert "quantization_config" not in config and "converted_from" not in config
    assert config["torch_dtype"] == "float32" and {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert torch.equal(tensors["model.layers.1.mlp.up_proj.weight"], weights["transformer.h.1.mlp.w1.weight"])


def test_adapter_of_finetune_round_trip(tmp_path: Path) -> None:
    adapter, base = tmp_path / "adapter", tmp_path / "base-qwen2"
    data = write_conversations(tmp_path / "data.json")
    settings = {"num_train_epochs": 1, "model_max_length": 64, "learning_rate": 0.05, "trainable_embeddings": "full"}
    flags = [text for flag, value in settings.items() for text in (f"--{flag}", value)]
    finetune_here("--model_name_or_path", TINY, "--data_path", data, "--output_dir", adapter, "--use_lora", *flags)
    assert convert(TINY, base) == 0
    assert convert(adapter, tmp_path / "there", "--base", base) == 0
    there = names_in(tmp_path / "there")
    assert {"tokenizer.json", "chat_template.jinja", "run_summary.json", "generation_config.json"} <= set(there)
    assert "qwen.tiktoken" not in there
    assert read_json(tmp_path / "there" / "adapter_config.json")["base_model_name_or_path"] == str(base)
    expected, converted = (logits_of(*each) for each in ((TINY, adapter), (base, tmp_path / "there")))
    assert_close(converted, expected, LOGITS_ATOL)
    assert (converted - logits_of(base)).abs().max() > 100 * LOGITS_ATOL, "the adapter does nothing"
    assert convert(tmp_path / "there", tmp_path / "back", "--base", TINY) == 0
    assert_close(logits_of(TINY, tmp_path / "back"), expected, LOGITS_ATOL)
    summaries = [read_json(folder / "run_summary.json") for folder in (adapter, tmp_path / "back")]
    assert summaries[0] == summaries[1]


@torch.no_grad()
def logits_of(base: Path, adapter: Path | None = None) -> torch.Tensor:
    register_qwen()
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter) if adapter else model
    logits: torch.Tensor = model.eval()(IDS).logits
    return logits


# ------------------------------------------------------------------------------------------------------------ bad input


def changed(**values: Any) -> Callable[[Path], object]:
    return lambda folder: change_json(folder / "config.json", **values)


def occupy_output(folder: Path) -> None:
    (folder.parent / "out").mkdir()
    (folder.parent / "out" / "a").touch()


def truncate_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "flags", "message"),
    [
        (changed(no_bias=False), [], "no_bias false"),
        (changed(rotary_pct=0.5), [], "rotary_pct 0.5"),
        (changed(model_type="qwen3"), [], "model_type 'qwen3' has no other layout"),
        (lambda folder: (folder / "config.json").unlink(), [], "has neither config.json nor adapter_config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), [], "config.json is not JSON"),
        (truncate_weights, [], "model.safetensors is damaged or incomplete"),
        (lambda folder: (folder / "qwen.tiktoken").write_text("no rank"), [], "qwen.tiktoken:1"),
        (lambda folder: None, ["--layout", "qwen"], "--layout qwen: .* has this layout already"),
        (lambda folder: None, ["--base", "x"], "--base does not apply to a checkpoint"),
        (lambda folder: None, ["--max_shard_size", "much"], "--max_shard_size much"),
        (occupy_output, [], "OUT .*not empty"),
    ],
)  # fmt: skip
def test_bad_input_is_reported_and_unchanged(
    damage: Callable[[Path], object],
    flags: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = copy_checkpoint(tmp_path / "qwen")
    damage(source)
    before = contents(source), names_in(tmp_path)
    assert convert(source, tmp_path / "out", *flags) == 2
    assert_error(capsys, message)
    assert (contents(source), names_in(tmp_path)) == before


@pytest.mark.parametrize("evidence", ["names", "record", "base", "none"])
def test_adapter_of_a_later_family_is_refused(
    tmp_path: Path, evidence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its modules may all have Qwen2's names. Nothing may say of what family it is: then it is converted."""
    prefix = "base_model.model.model.language_model" if evidence == "names" else "base_model.model.model"
    sizes = {"lora_A": (2, 32), "lora_B": (64, 2)}
    tensors = {f"{prefix}.layers.0.mlp.up_proj.{part}.weight": torch.ones(size) for part, size in sizes.items()}
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    adapter.mkdir()
    base.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["up_proj"], "base_model_name_or_path": "base"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    if evidence == "record":
        (adapter / "run_summary.json").write_text('{"model_type": "qwen3"}')
    if evidence == "base":
        (base / "config.json").write_text('{"model_type": "qwen3_5", "text_config": {}}')
    assert convert(adapter, tmp_path / "out") == (0 if evidence == "none" else 2)
    if evidence == "none":
        assert "taken for an adapter of Qwen2" in capsys.readouterr().err
        return
    message = {"names": "language_model.* larger one", "record": "model_type 'qwen3'", "base": "'qwen3_5_text'"}
    assert_error(capsys, f"{message[evidence]}, which has no other layout. Only qwen and qwen2")
    assert not (tmp_path / "out").exists()


def test_output_folder_in_the_input_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = copy_checkpoint(tmp_path / "qwen")
    for output in (source, source / "out"):
        assert convert(source, output) == 2
        assert_error(capsys, "OUT .* the folder of IN")


def test_qwen2_with_fewer_key_value_heads_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    later = write_later_checkpoint(tmp_path / "later", "qwen2")
    assert convert(later, tmp_path / "out") == 2
    assert_error(capsys, "as many key-value heads as heads|num_key_value_heads 2 is not num_attention_heads 4")
    assert not (tmp_path / "out").exists()


def assert_error(capsys: pytest.CaptureFixture[str], message: str) -> None:
    """Check that the last line is the error and that there is no traceback."""
    error = capsys.readouterr().err
    last = error.strip().splitlines()[-1]
    assert "Traceback" not in error
    assert last.startswith("scripts.convert_layout: error: "), last
    assert re.search(message, last), last
