"""Merging into a folder of Qwen3.5 as it is published: the text model changes, everything else stays."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Qwen3_5ForCausalLM, Qwen3_5ForConditionalGeneration

from checkpoints.writing import save_source
from errors import RunError
from export.companion_files import write_companion_files
from export.inputs import load_adapters, open_base
from export.merging import plan_merge
from merge_lora import verify
from tests.merging import merge_well, read
from tests.models import change_json
from tests.whole_folders import PROCESSOR_FILES, write_whole_folder

IDS = torch.tensor([[5, 17, 300, 42, 6, 99, 250, 31]])
TARGETS = ["in_proj_qkv", "in_proj_a", "out_proj", "q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    return write_whole_folder(tmp_path_factory.mktemp("whole") / "base", tied=request.param)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_whole_folder(tmp_path_factory.mktemp("whole") / "untied")


def make_adapter(base: Path, folder: Path, model_class: Any, **options: Any) -> Path:
    """Save with peft an adapter of a class of transformers, with random values."""
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS} | options
    model = get_peft_model(model_class.from_pretrained(base, dtype=torch.float32), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    change_json(folder / "adapter_config.json", base_model_name_or_path=str(base))
    return folder


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def stored_bytes(folder: Path) -> dict[str, bytes]:
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= {name: bytes(tensor.view(torch.uint8).numpy()) for name, tensor in load_file(file).items()}
    return tensors


@pytest.mark.parametrize("model_class", [Qwen3_5ForCausalLM, Qwen3_5ForConditionalGeneration])
def test_merged_folder_is_whole_and_answers_like_the_adapter(base: Path, tmp_path: Path, model_class: Any) -> None:
    adapter, merged = make_adapter(base, tmp_path / "adapter", model_class), tmp_path / "merged"
    output = merge_well("--adapter", adapter, "--output", merged, "--max_shard_size", "100KB")
    assert "verified:" in output.stdout and len(list(merged.glob("model-*.safetensors"))) > 1
    adapted = PeftModel.from_pretrained(model_class.from_pretrained(base, dtype=torch.float32), adapter)
    expected = logits_of(adapted)
    for each in (Qwen3_5ForCausalLM, Qwen3_5ForConditionalGeneration):
        torch.testing.assert_close(
            logits_of(each.from_pretrained(merged, dtype=torch.float32)), expected, atol=1e-4, rtol=1e-4
        )
    before, after = stored_bytes(base), stored_bytes(merged)
    assert before.keys() == after.keys()
    for name in before:
        if name.startswith(("model.visual.", "mtp.")):
            assert before[name] == after[name], name
    changed = [name for name in before if before[name] != after[name]]
    assert {name.split(".")[4] for name in changed} == {"linear_attn", "self_attn", "mlp"}
    assert read(merged) == read(base)
    for name in PROCESSOR_FILES:
        assert (merged / name).read_bytes() == (base / name).read_bytes()


def test_dtype_is_that_of_the_text_model(base: Path, tmp_path: Path) -> None:
    adapter, merged = make_adapter(base, tmp_path / "adapter", Qwen3_5ForCausalLM), tmp_path / "merged"
    merge_well("--adapter", adapter, "--output", merged, "--dtype", "bf16")
    config = read(merged)
    assert config["dtype"] == "bfloat16" and "dtype" not in config["text_config"]
    tensors = load_file(merged / "model.safetensors")
    assert tensors["model.language_model.norm.weight"].dtype == torch.bfloat16
    assert tensors["mtp.fc.weight"].dtype == torch.float32


def test_head_trained_apart_unties_both_configs(tmp_path: Path) -> None:
    base = write_whole_folder(tmp_path / "base", tied=True)
    adapter = make_adapter(base, tmp_path / "adapter", Qwen3_5ForCausalLM, target_modules=["lm_head"])
    merged = tmp_path / "merged"
    merge_well("--adapter", adapter, "--output", merged)
    config = read(merged)
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is False
    expected = logits_of(Qwen3_5ForCausalLM.from_pretrained(merged, dtype=torch.float32))
    assert torch.equal(logits_of(Qwen3_5ForConditionalGeneration.from_pretrained(merged)), expected)
    assert "lm_head.weight" in load_file(merged / "model.safetensors")


@pytest.mark.parametrize(
    "name",
    [
        "mtp.fc.weight",
        *(
            f"model.language_model.layers.0.linear_attn.{part}"
            for part in ("A_log", "conv1d.weight", "out_proj.weight")
        ),
    ],
)
def test_verification_finds_a_changed_tensor(untied: Path, tmp_path: Path, name: str) -> None:
    adapter, folder = make_adapter(untied, tmp_path / "adapter", Qwen3_5ForCausalLM), tmp_path / "merged"
    plan = plan_merge(open_base(untied), load_adapters([str(adapter)]), "auto", "auto")
    save_source(plan.written, folder, 10**9)
    write_companion_files(plan, folder)
    assert "verified:" in verify(plan, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[0] += 0.01
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match=re.escape(name.replace("language_model.", ""))):
        verify(plan, folder)


def test_folder_of_the_text_model_alone_stays_one(untied: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    model = Qwen3_5ForCausalLM.from_pretrained(untied, dtype=torch.float32)
    shutil.copytree(untied, base, ignore=shutil.ignore_patterns("model*", *PROCESSOR_FILES))
    model.save_pretrained(base)
    adapter, merged = make_adapter(base, tmp_path / "adapter", Qwen3_5ForCausalLM), tmp_path / "merged"
    merge_well("--adapter", adapter, "--output", merged)
    adapted = PeftModel.from_pretrained(model, adapter)
    result = Qwen3_5ForCausalLM.from_pretrained(merged, dtype=torch.float32)
    torch.testing.assert_close(logits_of(result), logits_of(adapted), atol=1e-4, rtol=1e-4)
    assert read(merged)["model_type"] == "qwen3_5_text"
    assert load_file(base / "model.safetensors").keys() == load_file(merged / "model.safetensors").keys()
