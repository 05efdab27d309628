"""A tiny Qwen2 base, LoRA adapters saved by peft, and the tensors that ``checkpoints.fold`` merges them to."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from checkpoints.adapter import read_adapter
from checkpoints.files import load_json
from checkpoints.fold import Fold, WeightedAdapter, plan_fold
from checkpoints.shards import open_checkpoint
from checkpoints.source import InDtype, TensorSource
from errors import ConfigError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LINEAR = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def make_base(folder: Path, tied: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    """Write a tiny Qwen2 with random weights and biases: 2 layers, hidden size 16, vocabulary 40."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied, initializer_range=0.3, pad_token_id=None,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    model.save_pretrained(folder)
    return folder


def make_adapter(base: Path, folder: Path, **options: Any) -> Path:
    """Save a LoRA adapter with peft, every trainable value random."""
    model = Qwen2ForCausalLM.from_pretrained(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 12} | options))
        torch.manual_seed(1)
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.2 * torch.randn_like(parameter)
        peft_model.save_pretrained(folder)
    return folder


def rewrite(adapter: Path, change: Change | None = None, **config: Any) -> None:
    """Change a saved adapter's tensors and its config."""
    file = adapter / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file(change(tensors) if change else tensors, file)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(load_json(path) | config))


def open_peft(base: Path, adapter: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(Qwen2ForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()


def plan(base: Path, *adapters: Path | tuple[Path, float]) -> Fold:
    """Plan the fold of adapters, each with weight 1 unless a weight is given."""
    pairs = [each if isinstance(each, tuple) else (each, 1.0) for each in adapters]
    weighted = [WeightedAdapter(read_adapter(folder), weight) for folder, weight in pairs]
    return plan_fold(open_checkpoint(base), load_json(base / "config.json"), weighted)


def fold(base: Path, *adapters: Path | tuple[Path, float], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    folded = plan(base, *adapters)
    return read_all(folded if dtype is None else InDtype(folded, dtype))


def read_all(source: TensorSource) -> dict[str, Tensor]:
    return {name: torch.cat([*source.blocks(name)]).to(source.dtype(name)) for name in source.names()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name


def assert_refused(base: Path, adapter: Path, match: str) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        plan(base, adapter)
    assert "\n" not in str(caught.value)
