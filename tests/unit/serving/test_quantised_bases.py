"""Adapters on the other kinds of bases: each request is answered as ``generate`` answers it with its adapter alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from checkpoints.names import BASE_QUANTIZATION
from loading.checkpoint import load_checkpoint
from loading.inference import load_for_inference
from tests.models import copy_checkpoint, write_later_checkpoint
from tests.quantized import write_gptq
from tests.serving import alone, answers, load_engine, requests

TARGETS = {"qwen": ["c_attn", "w1", "c_proj"], "qwen2": ["q_proj", "v_proj", "gate_proj", "down_proj"]}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def write_adapter(base: Path, folder: Path, seed: int, is_nf4: bool) -> Path:
    """Write an adapter of random values, as if it had been trained on the base, quantised while loading or not."""
    checkpoint = load_checkpoint(str(base))
    options: dict[str, Any] = {"target_modules": TARGETS[checkpoint.model_type], "r": 4, "task_type": "CAUSAL_LM"}
    model = get_peft_model(load_for_inference(checkpoint), LoraConfig(**options))
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    if is_nf4:
        (folder / BASE_QUANTIZATION).write_text(json.dumps(NF4))
    return folder


@pytest.mark.parametrize("model_type", ["qwen", "qwen2"])
@pytest.mark.parametrize("kind", ["float", "nf4", "gptq"])
def test_engine_answers_as_generate(tmp_path: Path, model_type: str, kind: str) -> None:
    base = plain = tmp_path / "plain"
    if model_type == "qwen":
        copy_checkpoint(plain)
    else:
        write_later_checkpoint(plain, model_type)
    if kind == "gptq":
        write_gptq(plain, base := tmp_path / "int4")
    folders = {name: write_adapter(base, tmp_path / name, seed, kind == "nf4") for seed, name in enumerate("ab")}
    order = (None, "a", "b", "a", None)
    asked = [request for name in order for request in requests(2, adapter=name)]
    with load_engine(base, folders) as engine:
        found = answers(engine, asked)
    expected = {}
    for name, folder in folders.items():
        model = load_for_inference(load_checkpoint(str(base)), str(folder))
        expected[name] = [alone(model, request) for request in requests(2)]
        with model.disable_adapter():
            expected[None] = [alone(model, request) for request in requests(2)]
    assert len({*expected[None], *expected["a"], *expected["b"]}) == 6, "every adapter changes the answers"
    assert found == [answer for name in order for answer in expected[name]]


def test_base_that_is_quantised_while_loading_is_so_for_requests_without_an_adapter(tmp_path: Path) -> None:
    """Its answers are those of NF4, not of the weights as they are stored."""
    base = write_later_checkpoint(tmp_path / "base", "qwen2")
    folder = write_adapter(base, tmp_path / "a", 0, is_nf4=True)
    plain = load_for_inference(load_checkpoint(str(base)))
    with load_engine(base, {"a": folder}) as engine:
        assert "4bit" in type(engine.model.model.layers[0].self_attn.q_proj.base_layer).__name__
        assert answers(engine, requests(4)) != [alone(plain, request) for request in requests(4)]
