"""Qwen3.5's folders, of the whole model and of its text model alone: loaded, saved and opened again."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Qwen3_5ForCausalLM, Qwen3_5ForConditionalGeneration

from checkpoints.files import load_json
from checkpoints.model_config import Quantization
from checkpoints.shards import open_checkpoint
from errors import ConfigError
from loading.adapter_check import check_adapter
from loading.adapters import EmbeddingsPolicy, LoraSettings, attach_lora, load_adapter
from loading.checkpoint import Checkpoint, load_checkpoint, load_model
from loading.quantized import QuantizedLinear
from tests.quantized import write_dequantized, write_gptq
from tests.whole_folders import PROCESSOR_FILES, write_whole_folder
from training.run_folder.saving import restore_tensors, save_model

IDS = torch.tensor([[5, 17, 300, 42, 6, 99, 250, 31]])


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def checkpoint(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Checkpoint:
    folder = tmp_path_factory.mktemp("whole")
    return load_checkpoint(str(write_whole_folder(folder, tied=request.param)))


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def randomize(model: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def test_text_model_is_that_of_the_whole_one(checkpoint: Checkpoint) -> None:
    whole = Qwen3_5ForConditionalGeneration.from_pretrained(checkpoint.folder, dtype=torch.float32)
    model = load_model(checkpoint, torch.float32)
    assert not [name for name, _ in model.named_parameters() if "visual" in name or "mtp" in name]
    assert torch.equal(logits_of(model), logits_of(whole))


@pytest.mark.parametrize("exact", [False, True])
def test_saved_folder_is_whole(checkpoint: Checkpoint, tmp_path: Path, exact: bool) -> None:
    model = load_model(checkpoint, torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    save_model(model, checkpoint, tmp_path / "saved", show_progress=False, exact=exact)
    folder = tmp_path / "saved"
    before, after = (load_file(path / "model.safetensors") for path in (checkpoint.folder, folder))
    assert before.keys() == after.keys()
    for name in before:
        is_same = before[name].numpy().tobytes() == after[name].numpy().tobytes()
        assert is_same == name.startswith(("model.visual.", "mtp.")), name
    assert load_json(folder / "config.json") == load_json(checkpoint.folder / "config.json")
    for name in PROCESSOR_FILES:
        assert (folder / name).read_bytes() == (checkpoint.folder / name).read_bytes()
    expected = logits_of(model)
    for each in (Qwen3_5ForCausalLM, Qwen3_5ForConditionalGeneration):
        assert torch.equal(logits_of(each.from_pretrained(folder, dtype=torch.float32)), expected), each
    assert torch.equal(logits_of(load_model(load_checkpoint(str(folder)), torch.float32)), expected)
    (tmp_path / "links").mkdir()  # as in a run that resumes
    (tmp_path / "links" / "model.safetensors").symlink_to(folder / "model.safetensors")
    restored = load_model(checkpoint, torch.float32)
    restore_tensors(restored, tmp_path / "links")
    assert torch.equal(logits_of(restored), expected)


@pytest.mark.parametrize("embeddings", ["none", "full", "chatml_tokens"])
def test_adapter_has_the_names_of_the_whole_model(checkpoint: Checkpoint, tmp_path: Path, embeddings: str) -> None:
    settings = LoraSettings(rank=4, rank_pattern={r"model\.layers\.0\.mlp\.up_proj": 2})
    policy = EmbeddingsPolicy(embeddings, "")
    model = attach_lora(load_model(checkpoint, torch.float32), checkpoint, settings, policy)
    randomize(model)
    save_model(model, checkpoint, tmp_path / "adapter", show_progress=False)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(
        name.startswith(("base_model.model.model.language_model.", "base_model.model.lm_head.")) for name in stored
    )
    assert not set(PROCESSOR_FILES) & {path.name for path in (tmp_path / "adapter").iterdir()}
    check_adapter(checkpoint, str(tmp_path / "adapter"), "--adapter")
    expected = logits_of(model)
    ours = load_adapter(load_model(checkpoint, torch.float32), str(tmp_path / "adapter"), "--adapter")
    torch.testing.assert_close(logits_of(ours), expected, atol=1e-4, rtol=1e-4)
    whole = Qwen3_5ForConditionalGeneration.from_pretrained(checkpoint.folder, dtype=torch.float32)
    torch.testing.assert_close(
        logits_of(PeftModel.from_pretrained(whole, tmp_path / "adapter")), expected, atol=1e-4, rtol=1e-4
    )
    restored = attach_lora(load_model(checkpoint, torch.float32), checkpoint, settings, policy)
    restore_tensors(restored, tmp_path / "adapter")
    torch.testing.assert_close(logits_of(restored), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("embeddings", ["none", "full"])
def test_adapter_of_a_text_model_s_folder_opens_with_peft(
    checkpoint: Checkpoint, tmp_path: Path, embeddings: str
) -> None:
    """transformers saves a text model of a whole folder by the names of the whole one, but with its own config."""
    base = tmp_path / "base"
    shutil.copytree(checkpoint.folder, base, ignore=shutil.ignore_patterns("model*", *PROCESSOR_FILES))
    Qwen3_5ForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).save_pretrained(base)
    assert "model.language_model.norm.weight" in load_file(base / "model.safetensors")
    text = load_checkpoint(str(base))
    policy = EmbeddingsPolicy(embeddings, "")
    model = attach_lora(load_model(text, torch.float32), text, LoraSettings(rank=4), policy)
    randomize(model)
    save_model(model, text, tmp_path / "adapter", show_progress=False)
    opened = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    torch.testing.assert_close(logits_of(opened), logits_of(model), atol=1e-4, rtol=1e-4)
    check_adapter(text, str(tmp_path / "adapter"), "--adapter")
    check_adapter(checkpoint, str(tmp_path / "adapter"), "--adapter")


@pytest.mark.parametrize("model_class", [Qwen3_5ForCausalLM, Qwen3_5ForConditionalGeneration])
def test_adapters_of_both_classes_load(checkpoint: Checkpoint, tmp_path: Path, model_class: Any) -> None:
    pattern = r".*\.(layers)\.\d+\.(self_attn|linear_attn|mlp)\.\w+_proj"
    if model_class is Qwen3_5ForConditionalGeneration:
        pattern = r".*language_model" + pattern
    base = model_class.from_pretrained(checkpoint.folder, dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=pattern, alpha_pattern={"mlp.up_proj": 2}))
    randomize(adapted)
    adapted.save_pretrained(tmp_path)
    ours = load_adapter(load_model(checkpoint, torch.float32), str(tmp_path), "--adapter")
    torch.testing.assert_close(logits_of(ours), logits_of(adapted), atol=1e-4, rtol=1e-4)


def test_adapter_of_the_vision_tower_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    base = Qwen3_5ForConditionalGeneration.from_pretrained(checkpoint.folder)
    get_peft_model(base, LoraConfig(target_modules=["qkv", "q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.visual\..* is not of the text model"):
        check_adapter(checkpoint, str(tmp_path), "--adapter")


def test_packed_text_model_of_a_whole_folder(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = re.compile(r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight")
    monkeypatch.setattr("tests.quantized._BLOCK_WEIGHT", layers)
    weights = write_gptq(checkpoint.folder, tmp_path / "packed")
    write_dequantized(checkpoint.folder, tmp_path / "plain", weights)
    models = [load_model(load_checkpoint(str(tmp_path / name)), torch.float32) for name in ("packed", "plain")]
    assert sum(isinstance(module, QuantizedLinear) for module in models[0].modules()) == len(weights) == 16
    torch.testing.assert_close(*map(logits_of, models), atol=1e-4, rtol=1e-4)


def test_text_model_is_quantised_while_loading(checkpoint: Checkpoint) -> None:
    model = load_model(checkpoint, torch.float32, quantize=Quantization("nf4", 4))
    layer = model.get_submodule("model.layers.0.linear_attn.in_proj_qkv")
    weight = layer.dequantize(torch.float32)
    stored = open_checkpoint(checkpoint.folder).read("model.layers.0.linear_attn.in_proj_qkv.weight")
    assert 0 < (weight - stored).norm() < 0.2 * stored.norm()
