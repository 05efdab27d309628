"""Saved models open in transformers and peft with the trained weights; a faulty file is noticed."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoints.rounding import round_rows
from errors import RunError
from loading.adapters import embeddings_policy
from loading.checkpoint import load_checkpoint, load_model
from qwen_model.register import register_qwen
from tests.commands import Recorder, finetune_here, limited_file_size, names_in, read_json
from tests.models import (
    TINY,
    change_json,
    copy_checkpoint,
    copy_in_bfloat16,
    copy_tied,
    write_conversations,
    write_later_checkpoint,
)
from training.config.parsing import parse_args
from training.model import load_training_model
from training.run_folder.saving import save_model
from training.training_arguments import build_training_arguments

register_qwen()

IDS = torch.tensor([[701, 39, 72, 702, 198, 5, 6, 7, 701, 702, 300, 400]])
RECORDS = [
    "data_receipt.html",
    "data_receipt.json",
    "run_args.json",
    "run_summary.json",
    "training_log.jsonl",
    "training_loss.png",
    "training_samples.json",
]


def finetune(model: Path, output: Path, *flags: object) -> Recorder:
    data = write_conversations(output.parent / "train.json")
    return finetune_here(
        "--model_name_or_path", model, "--data_path", data, "--output_dir", output, "--max_steps", 3,
        "--learning_rate", 1e-2, "--logging_steps", 1, "--save_strategy", "no", *flags,
    )  # fmt: skip


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits.float()


def dtypes(file: Path) -> set[str]:
    with safe_open(str(file), framework="pt") as tensors:
        return {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118


def reopen(base: Path, adapter: Path) -> PeftModel:
    """Return the adapter on a fresh base in fp32, as a user of peft loads it."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)


# ------------------------------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize(
    ("mode", "tied"),
    [("none", False), ("full", False), ("chatml_tokens", False), ("full", True), ("chatml_tokens", True)],
)
def test_a_reloaded_adapter_computes_what_was_trained(tmp_path: Path, mode: str, tied: bool) -> None:
    base = copy_tied(tmp_path / "base") if tied else TINY
    run = finetune(base, tmp_path / "out", "--use_lora", "--trainable_embeddings", mode)
    trained = logits(run.model)
    untouched = logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    assert (trained - untouched).abs().max() > 0.1
    reopened = reopen(base, tmp_path / "out")
    assert (logits(reopened) - trained).abs().max() <= 5e-5  # the trained model sums in another order
    assert dtypes(tmp_path / "out" / "adapter_model.safetensors") == {"F32"}


def test_adapter_of_a_base_model_contains_its_trained_embeddings(tmp_path: Path) -> None:
    """The original script did not save them: its reloaded adapters answered differently."""
    base = copy_checkpoint(tmp_path / "base", chat_format="raw")
    run = finetune(base, tmp_path / "out", "--use_lora")
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    stored = load_file(base / "model.safetensors")
    for name in ("transformer.wte.weight", "lm_head.weight"):
        assert not torch.equal(saved[f"base_model.model.{name}"], stored[name].float()), name
    assert (logits(reopen(base, tmp_path / "out")) - logits(run.model)).abs().max() <= 1e-5


@pytest.mark.parametrize(("model_type", "tied"), [("qwen2", True), ("qwen3", False)])
def test_adapters_of_later_families_reload(tmp_path: Path, model_type: str, tied: bool) -> None:
    base = write_later_checkpoint(tmp_path / "base", model_type, tied=tied)
    run = finetune(base, tmp_path / "out", "--use_lora", "--trainable_embeddings", "full")
    assert (logits(reopen(base, tmp_path / "out")) - logits(run.model)).abs().max() <= 1e-5
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (base, tmp_path / "out")]
    assert tokenizers[0]("Hi 你好").input_ids == tokenizers[1]("Hi 你好").input_ids


@pytest.mark.parametrize("mode", ["none", "full", "chatml_tokens"])
def test_adapter_is_saved_in_the_precision_of_its_base(tmp_path: Path, mode: str) -> None:
    """The trained values are float32 and are rounded once, when they are saved."""
    base = copy_in_bfloat16(tmp_path / "base")
    run = finetune(base, tmp_path / "out", "--use_lora", "--trainable_embeddings", mode)
    file = tmp_path / "out" / "adapter_model.safetensors"
    assert dtypes(file) == {"BF16"}
    saved = load_file(file)
    trained = {name.replace(".default", ""): p for name, p in run.model.named_parameters() if p.requires_grad}
    lora = {name: p for name, p in trained.items() if "lora_" in name}
    assert len(lora) == 20
    for name, parameter in lora.items():
        assert parameter.dtype == torch.float32
        assert torch.equal(saved[name], parameter.bfloat16()), name
    assert len(saved) == len(trained)


def test_files_of_an_adapter(tmp_path: Path) -> None:
    finetune(TINY, tmp_path / "out", "--use_lora", "--lora_r", 4, "--lora_alpha", 8, "--save_strategy", "steps",
             "--save_steps", 2)  # fmt: skip
    adapter = ["adapter_config.json", "adapter_model.safetensors"]
    tokenizer = ["generation_config.json", "qwen.tiktoken", "tokenizer_config.json"]
    assert names_in(tmp_path / "out") == sorted([*adapter, "checkpoint-2", "checkpoint-3", *tokenizer, *RECORDS])
    config = read_json(tmp_path / "out" / "adapter_config.json")
    assert config["base_model_name_or_path"] == str(TINY)
    assert (config["r"], config["lora_alpha"], config["inference_mode"]) == (4, 8, True)
    assert sorted(config["target_modules"]) == ["c_attn", "c_proj", "w1", "w2"]
    assert (config["task_type"], config["modules_to_save"]) == ("CAUSAL_LM", None)
    # A checkpoint is an adapter too, with the state that resuming needs.
    state = {"optimizer.pt", "scheduler.pt", "trainer_state.json"}
    assert {*adapter, *tokenizer, *state} < set(names_in(tmp_path / "out" / "checkpoint-2"))
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-2"):
        assert not [name for name in names_in(folder) if name.endswith((".bin", ".pkl", ".partial"))]
        assert read_json(folder / "generation_config.json")["eos_token_id"] == [702, 700]


# --------------------------------------------------------------------------------------------------------- full weights


@pytest.mark.parametrize("model", ["qwen", "tied", "qwen2", "qwen3"])
def test_reloaded_full_weights_are_those_that_were_trained(tmp_path: Path, model: str) -> None:
    base = {
        "qwen": lambda: TINY,
        "tied": lambda: copy_tied(tmp_path / "base"),
        "qwen2": lambda: write_later_checkpoint(tmp_path / "base", "qwen2", tied=True),
        "qwen3": lambda: write_later_checkpoint(tmp_path / "base", "qwen3"),
    }[model]()
    run = finetune(base, tmp_path / "out")
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in reopened.parameters()} == {torch.float32}
    trained = dict(run.model.named_parameters())
    assert all(torch.equal(value, trained[name]) for name, value in reopened.named_parameters())
    assert (logits(reopened) - logits(run.model)).abs().max() <= 5e-5  # the trained model sums in another order
    assert reopened.config.tie_word_embeddings == (model in ("tied", "qwen2"))


def test_full_weights_are_saved_in_the_precision_of_their_base(tmp_path: Path) -> None:
    run = finetune(copy_in_bfloat16(tmp_path / "base"), tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    trained = dict(run.model.named_parameters())
    assert saved.keys() == trained.keys()
    for name, parameter in trained.items():
        assert parameter.dtype == torch.float32
        rows = parameter.detach().view(len(parameter), -1)
        assert torch.equal(saved[name], round_rows(rows, torch.bfloat16, "dithered", name, 0).view_as(parameter)), name
    config = read_json(tmp_path / "out" / "config.json")
    assert (config["torch_dtype"], config["bf16"], config["fp16"], config["fp32"]) == ("bfloat16", True, False, False)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_bfloat16_weights_with_a_float32_config_are_saved_in_float32(tmp_path: Path) -> None:
    finetune(copy_checkpoint(tmp_path / "base"), tmp_path / "out")
    assert dtypes(tmp_path / "base" / "model.safetensors") == {"BF16"}
    assert dtypes(tmp_path / "out" / "model.safetensors") == {"F32"}


def test_files_of_full_weights(tmp_path: Path) -> None:
    finetune(TINY, tmp_path / "out", "--gradient_checkpointing")  # which turns the cache off
    model = ["config.json", "generation_config.json", "model.safetensors", "qwen.tiktoken", "tokenizer_config.json"]
    assert names_in(tmp_path / "out") == sorted([*model, "chat_template.jinja", *RECORDS])
    config = {key: value for key, value in read_json(TINY / "config.json").items() if key != "auto_map"}
    assert read_json(tmp_path / "out" / "config.json") == config
    assert "auto_map" not in read_json(tmp_path / "out" / "tokenizer_config.json")
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (TINY, tmp_path / "out")]
    assert tokenizers[0]("Hi 你好<|im_end|>").input_ids == tokenizers[1]("Hi 你好<|im_end|>").input_ids


def test_large_weights_are_sharded_and_replace_earlier_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = load_checkpoint(str(TINY))
    model = load_model(checkpoint, torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr("training.run_folder.saving.MAX_SHARD_SIZE", 100_000)
        save_model(model, checkpoint, tmp_path)
    weights = [name for name in names_in(tmp_path) if name.startswith("model")]
    assert weights[-1] == "model.safetensors.index.json" and len(weights) > 3
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    model.lm_head.weight.data += 1
    save_model(model, checkpoint, tmp_path)
    assert [name for name in names_in(tmp_path) if name.startswith("model")] == ["model.safetensors"]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


# ---------------------------------------------------------------------------------------------------- generation config


@pytest.mark.parametrize("flags", [[], ["--use_lora"]])
def test_generation_stops_at_im_end_and_end_of_text(tmp_path: Path, flags: list[str]) -> None:
    """For a base model too: after training it uses ChatML."""
    base = copy_checkpoint(tmp_path / "base", chat_format="raw")
    finetune(base, tmp_path / "out", *flags)
    before, after = (read_json(folder / "generation_config.json") for folder in (base, tmp_path / "out"))
    assert (before["chat_format"], before["eos_token_id"]) == ("raw", 700)
    expected = before | {"chat_format": "chatml", "eos_token_id": [702, 700], "pad_token_id": 700}
    assert {key: after.get(key) for key in expected if key != "transformers_version"} == {
        key: value for key, value in expected.items() if key != "transformers_version"
    }


def test_a_missing_generation_config_is_written(tmp_path: Path) -> None:
    base = copy_checkpoint(tmp_path / "base")
    (base / "generation_config.json").unlink()
    finetune(base, tmp_path / "out", "--use_lora", "--trainable_embeddings", "none")
    config = read_json(tmp_path / "out" / "generation_config.json")
    assert (config["chat_format"], config["eos_token_id"], config["pad_token_id"]) == ("chatml", [702, 700], 700)
    assert config["max_window_size"] == 6144


def test_later_families_keep_their_generation_config(tmp_path: Path) -> None:
    base = write_later_checkpoint(tmp_path / "base", "qwen2")
    finetune(base, tmp_path / "out", "--use_lora")
    config = read_json(tmp_path / "out" / "generation_config.json")
    assert (config["eos_token_id"], config["pad_token_id"], config["top_k"]) == ([702, 700], 700, 20)
    assert "chat_format" not in config


@pytest.mark.parametrize("values", [{"do_sample": False}, {"do_sample": None}, {"temperature": 0.0}])
def test_a_generation_config_that_transformers_refuses_is_saved(tmp_path: Path, values: dict[str, Any]) -> None:
    """transformers refuses to save sampling settings beside do_sample false."""
    base = copy_checkpoint(tmp_path / "base")
    change_json(base / "generation_config.json", **values)
    finetune(base, tmp_path / "out", "--use_lora")
    assert "adapter_model.safetensors" in names_in(tmp_path / "out")
    assert read_json(tmp_path / "out" / "generation_config.json")["eos_token_id"] == [702, 700]


# ------------------------------------------------------------------------------------------------------ reading it back


def untrained(*flags: str) -> tuple[Any, Any]:
    """Return a checkpoint and its model as before the first step, except that lora_B is not zero."""
    checkpoint = load_checkpoint(str(TINY))
    args = parse_args(list(flags))
    policy = embeddings_policy("none", checkpoint) if args.lora.use_lora else None
    model = load_training_model(checkpoint, args, build_training_arguments(args), policy)
    if policy is not None:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
    return checkpoint, model


MODES = pytest.mark.parametrize(
    ("flags", "name", "file"),
    [
        (["--use_lora"], "base_model.model.transformer.h.1.mlp.w2.lora_A.default.weight", "adapter_model.safetensors"),
        ([], "transformer.h.1.mlp.w2.weight", "model.safetensors"),
    ],
    ids=["lora", "full"],
)


@MODES
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_model_is_not_saved(tmp_path: Path, flags: list[str], name: str, file: str, value: float) -> None:
    checkpoint, model = untrained(*flags)
    model.get_parameter(name).data[1, 2] = value
    message = f"{name.replace('.default', '')} holds NaN or infinity: the run diverged, and nothing was saved"
    with pytest.raises(RunError, match=rf"^{re.escape(message)}\. Lower --learning_rate$"):
        save_model(model, checkpoint, tmp_path)
    assert names_in(tmp_path) == []


def losing(tensors: dict[str, Tensor], name: str) -> None:
    del tensors[name]


def altering(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name] + 1e-3


def reshaping(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name].flatten()


@MODES
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (losing, "is missing from the saved file"),
        (altering, "differs on disk from memory"),
        (reshaping, "differs on disk from memory"),
    ],
)
def test_a_file_that_differs_from_memory_is_noticed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    name: str,
    file: str,
    fault: Callable[[dict[str, Tensor], str], None],
    message: str,
) -> None:
    checkpoint, model = untrained(*flags)
    saved_name = name.replace(".default", "")

    def faulty(entries: list[Any], path: Path, *others: Any) -> None:
        tensors = {entry.name: next(iter(entry.blocks())) for entry in entries}
        fault(tensors, saved_name)
        save_file(tensors, path, metadata={"format": "pt"})

    # Adapters and shards are written by one function.
    monkeypatch.setattr("checkpoints.writing._write_shard", faulty)
    with pytest.raises(RunError, match=rf"^{re.escape(saved_name)} {message}\. Nothing was saved"):
        save_model(model, checkpoint, tmp_path)
    assert names_in(tmp_path) == []


def test_saved_tensors_of_zeros_are_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint, model = untrained("--use_lora")
    model.get_parameter("base_model.model.transformer.h.0.mlp.w1.lora_B.default.weight").data.zero_()
    with caplog.at_level(logging.WARNING):
        save_model(model, checkpoint, tmp_path)
    assert caplog.messages == [
        "1 saved tensors are all zero, among them base_model.model.transformer.h.0.mlp.w1.lora_B.weight"
    ]


@MODES
@pytest.mark.parametrize("large", [False, True], ids=["one file", "shards"])
def test_a_failed_save_leaves_the_earlier_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], name: str, file: str, large: bool
) -> None:
    if large:
        monkeypatch.setattr("training.run_folder.saving.MAX_SHARD_SIZE", 100_000)
    checkpoint, model = untrained(*flags)
    save_model(model, checkpoint, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model.get_parameter(name).data += 1
    with limited_file_size(len(before["generation_config.json"]) // 2), pytest.raises(RunError) as caught:
        save_model(model, checkpoint, tmp_path, show_progress=False)  # a bar cannot write to a limited file either
    assert str(caught.value).startswith(f"cannot save to {tmp_path} (")
    assert str(caught.value).endswith("). Free some space there; what was saved before is unchanged")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_saved_architecture_is_that_of_the_base(tmp_path: Path) -> None:
    """Other programs do not have the class that trained."""
    for model_type, architectures in (("qwen2", ["Qwen2ForCausalLM"]), ("qwen3", ["Qwen3ForCausalLM"])):
        base = write_later_checkpoint(tmp_path / model_type, model_type)
        change_json(base / "config.json", architectures=None if model_type == "qwen3" else architectures)
        checkpoint = load_checkpoint(str(base))
        save_model(load_model(checkpoint, torch.float32), checkpoint, tmp_path / f"{model_type}-saved")
        assert read_json(tmp_path / f"{model_type}-saved" / "config.json")["architectures"] == architectures


@pytest.mark.parametrize("flags", [[], ["--use_lora"]], ids=["full", "lora"])
def test_weights_have_the_permissions_of_other_files(tmp_path: Path, flags: list[str]) -> None:
    checkpoint, model = untrained(*flags)
    save_model(model, checkpoint, tmp_path)
    (tmp_path / "any").touch()
    assert {file.stat().st_mode for file in tmp_path.iterdir()} == {(tmp_path / "any").stat().st_mode}
