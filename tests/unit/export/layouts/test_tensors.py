"""Qwen v1 to Qwen2 and back: equal values, and equal logits up to ``seq_length``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

from checkpoints.dequantized_reader import open_dequantized
from checkpoints.files import load_json, save_json
from checkpoints.shards import open_checkpoint
from checkpoints.source import TensorSource
from checkpoints.writing import save_source
from errors import ConfigError
from export.layouts.config import config_to_qwen2, find_quantization_config
from export.layouts.qwen2_names import layout_of_names
from export.layouts.tensors import tensors_to_qwen, tensors_to_qwen2
from qwen_model.modeling_qwen import QWenLMHeadModel
from tests.golden import LOGITS_ATOL, Golden, assert_close
from tests.models import TINY, copy_checkpoint, copy_in_bfloat16, copy_tied
from tests.quantized import write_awq, write_gptq

CONFIG = load_json(TINY / "config.json")


def read_all(source: TensorSource) -> dict[str, Tensor]:
    return {name: torch.cat([*source.blocks(name)]) for name in source.names()}


def write_qwen2(folder: Path, target: Path, dynamic_ntk: bool = False, **changes: Any) -> Path:
    config = load_json(folder / "config.json")
    if quantization := find_quantization_config(folder, config):
        config["quantization_config"] = quantization
    save_source(tensors_to_qwen2(open_checkpoint(folder), config), target, 10**8)
    save_json(config_to_qwen2(config, dynamic_ntk) | changes, target / "config.json")
    return target


def load_qwen2(folder: Path) -> Any:
    """Open the folder with transformers; check that it loads every tensor."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert isinstance(model, Qwen2ForCausalLM)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


def draw_ids(vocabulary: int, length: int, rows: int = 2) -> Tensor:
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))


# --------------------------------------------------------------------------------------------------------- equal logits


@torch.no_grad()
def test_logits_equal_qwen_up_to_seq_length(any_golden: Golden, tiny_model: QWenLMHeadModel, tmp_path: Path) -> None:
    model = load_qwen2(write_qwen2(any_golden.tiny, tmp_path / "qwen2"))
    config = any_golden.config
    ids = draw_ids(config["vocab_size"], config["seq_length"])
    assert_close(model(ids).logits, tiny_model(ids).logits, LOGITS_ATOL, "whole rows")
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    padded = [each(ids, attention_mask=mask).logits[mask.bool()] for each in (model, tiny_model)]
    assert_close(padded[0], padded[1], LOGITS_ATOL, "a row padded on the left")


def test_greedy_answers_equal_qwen(any_golden: Golden, tiny_model: QWenLMHeadModel, tmp_path: Path) -> None:
    model = load_qwen2(write_qwen2(any_golden.tiny, tmp_path / "qwen2"))
    ids = draw_ids(any_golden.config["vocab_size"], 12, rows=3)
    mask = torch.ones_like(ids)
    mask[2, :5] = 0
    settings: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "repetition_penalty": 1.0, "pad_token_id": 0}
    answers = [each.generate(ids, attention_mask=mask, **settings) for each in (model, tiny_model)]
    assert answers[0].shape == (3, 32)
    assert torch.equal(*answers)


@torch.no_grad()
def test_dynamic_ntk_of_transformers_equals_qwen_at_multiples_of_two(tmp_path: Path) -> None:
    """The closest setting: the same factor at 2 and 4 times ``seq_length``, and none up to it."""
    source = copy_checkpoint(tmp_path / "qwen", use_logn_attn=False)
    expected = QWenLMHeadModel.from_pretrained(source, dtype=torch.float32).eval()
    model = load_qwen2(write_qwen2(source, tmp_path / "dynamic", dynamic_ntk=True))
    plain = load_qwen2(write_qwen2(source, tmp_path / "plain"))
    for times in (1, 2, 4):
        ids = draw_ids(960, times * CONFIG["seq_length"], rows=1)
        assert_close(model(ids).logits, expected(ids).logits, LOGITS_ATOL, f"{times} times")
        differs = (plain(ids).logits - expected(ids).logits).abs().max() > 100 * LOGITS_ATOL
        assert bool(differs) == (times > 1)


# ----------------------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("make", [copy_checkpoint, copy_tied, copy_in_bfloat16])
def test_round_trip_keeps_every_value(make: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = make(tmp_path / "qwen")
    there = write_qwen2(folder, tmp_path / "there")
    back = tensors_to_qwen(open_checkpoint(there), load_json(there / "config.json"))
    expected = load_file(folder / "model.safetensors")
    assert layout_of_names(back.names()) == "qwen"
    values = read_all(back)
    assert values.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(values[name], tensor), name
        assert (back.dtype(name), back.shape(name)) == (tensor.dtype, tuple(tensor.shape)), name


@pytest.mark.parametrize("layout", ["qwen", "qwen2"])
def test_row_ranges_equal_slices_of_the_whole_tensor(layout: str, tmp_path: Path) -> None:
    source: TensorSource = tensors_to_qwen2(open_checkpoint(TINY), CONFIG)
    if layout == "qwen":
        source = tensors_to_qwen(source, config_to_qwen2(CONFIG))
    for name in source.names():
        whole, size = source.read(name), source.shape(name)[0]
        assert whole.shape == source.shape(name)
        for start, stop in ((0, 1), (size // 3 - 1, size // 3 + 1), (1, size - 1), (size - 1, size), (5, None)):
            assert torch.equal(source.rows(name, start, stop), whole[start:stop]), (name, start, stop)


class Counting:
    """Counts the rows read of each tensor."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, source: TensorSource) -> None:
        self.rows: dict[str, int] = {}
        read = source.rows

        def counted(name: str, start: int = 0, stop: int | None = None) -> Tensor:
            rows = read(name, start, stop)
            self.rows[name] = self.rows.get(name, 0) + len(rows)
            return rows

        monkeypatch.setattr(source, "rows", counted)


def test_conversion_reads_every_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("checkpoints.source.BLOCK_ELEMENTS", 300)
    base = open_checkpoint(TINY)
    counting = Counting(monkeypatch, base)
    read_all(tensors_to_qwen(tensors_to_qwen2(base, CONFIG), config_to_qwen2(CONFIG)))
    assert counting.rows == {name: base.shape(name)[0] for name in base.names()}


def test_key_names_of_august_2023_are_understood() -> None:
    names = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
             "ffn_hidden_size": "intermediate_size", "padded_vocab_size": "vocab_size"}  # fmt: skip
    old = {key: value for key, value in CONFIG.items() if key not in names.values()}
    old |= {early: CONFIG[late] for early, late in names.items()}
    assert config_to_qwen2(old) == config_to_qwen2(CONFIG)
    assert tensors_to_qwen2(open_checkpoint(TINY), old).names()


# ------------------------------------------------------------------------------------------------------------ quantised


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bits": 8, "desc_act": True},
        {"sym": False, "config": "new", "zeros": "v2"},
        {"config": "quantize_config.json", "file_name": "gptq_model-4bit-32g"},
        {"config": "unnamed", "group_size": -1, "zero_biases": False},
    ],
    ids=str,
)
def test_gptq_stays_quantised(options: dict[str, Any], tmp_path: Path) -> None:
    write_gptq(TINY, tmp_path / "qwen", **options)
    there = write_qwen2(tmp_path / "qwen", tmp_path / "there")
    assert_same_weights(tmp_path / "qwen", there)
    back = tensors_to_qwen(open_checkpoint(there), load_json(there / "config.json"))
    stored = open_checkpoint(tmp_path / "qwen")
    for name in back.names():
        assert torch.equal(back.read(name), stored.read(name)), name


def test_awq_stays_quantised(tmp_path: Path) -> None:
    write_awq(TINY, tmp_path / "qwen", config="quant_config.json")
    assert_same_weights(tmp_path / "qwen", write_qwen2(tmp_path / "qwen", tmp_path / "there"))


def assert_same_weights(qwen: Path, qwen2: Path) -> None:
    """Compare the dequantised values."""
    config = load_json(qwen / "config.json")
    expected = read_all(tensors_to_qwen2(open_dequantized(qwen, torch.float32), config))
    converted = read_all(open_dequantized(qwen2, torch.float32))
    assert converted.keys() == expected.keys()
    assert len([name for name in open_checkpoint(qwen2).names() if name.endswith(".qweight")]) == 2 * 7
    for name, tensor in expected.items():
        assert torch.equal(converted[name], tensor), name


@torch.no_grad()
def test_converted_gptq_model_has_equal_logits(tmp_path: Path) -> None:
    from loading.checkpoint import load_checkpoint, load_model

    write_gptq(TINY, tmp_path / "qwen")
    there = write_qwen2(tmp_path / "qwen", tmp_path / "there")
    for name in ("qwen.tiktoken", "tokenizer_config.json"):
        (there / name).write_bytes((TINY / name).read_bytes())
    ids = draw_ids(960, 40)
    models = [load_model(load_checkpoint(str(folder)), torch.float32) for folder in (tmp_path / "qwen", there)]
    assert_close(models[1](ids).logits, models[0](ids).logits, LOGITS_ATOL)


# ------------------------------------------------------------------------------------------------------------ bad input


def write_tensors(folder: Path, tensors: dict[str, Tensor]) -> TensorSource:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return open_checkpoint(folder)


def test_computed_tables_and_zero_biases_are_dropped(tmp_path: Path) -> None:
    tensors = load_file(TINY / "model.safetensors")
    block = "transformer.h.0"
    added = {
        "transformer.rotary_emb.inv_freq": torch.ones(4), f"{block}.attn.rotary_emb.inv_freq": torch.ones(4),
        f"{block}.attn.bias": torch.ones(1, 1, 4, 4), f"{block}.attn.masked_bias": torch.ones(1),
        f"{block}.mlp.c_proj.bias": torch.zeros(32),
    }  # fmt: skip
    source = tensors_to_qwen2(write_tensors(tmp_path / "old", tensors | added), CONFIG)
    assert set(source.names()) == set(tensors_to_qwen2(open_checkpoint(TINY), CONFIG).names())


C_ATTN = "transformer.h.0.attn.c_attn"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transformer.h.0.mlp.c_proj.bias": torch.ones(32)}, "c_proj.bias is not zero, but"),
        (
            {"transformer.h.0.attn.c_attn.weight": torch.zeros(80, 32)},
            r"has shape \(80, 32\); expected 3 x hidden_size \(32\)",
        ),
        ({"transformer.visual.weight": torch.zeros(2, 2)}, "transformer.visual.weight has no counterpart"),
        ({f"{C_ATTN}.weight.absmax": torch.zeros(2)}, "packed by bitsandbytes"),
        ({f"{C_ATTN}.SCB": torch.zeros(96)}, "packed by bitsandbytes"),
    ],
)
def test_tensors_without_a_counterpart_are_refused(change: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    tensors = load_file(TINY / "model.safetensors") | change
    with pytest.raises(ConfigError, match=message):
        tensors_to_qwen2(write_tensors(tmp_path / "changed", tensors), CONFIG)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("self_attn.k_proj.weight", torch.zeros(16, 32), "as many key-value heads as heads"),
        ("self_attn.v_proj.bias", None, "v_proj.bias is missing"),
        ("self_attn.q_norm.weight", torch.zeros(8), "q_norm.weight has no counterpart in the layout of Qwen v1"),
    ],
)
def test_qwen2_tensors_that_qwen_cannot_express_are_refused(
    name: str, tensor: Tensor | None, message: str, tmp_path: Path
) -> None:
    tensors = load_file(write_qwen2(TINY, tmp_path / "there") / "model.safetensors")
    tensors.pop(f"model.layers.0.{name}", None)
    if tensor is not None:
        tensors[f"model.layers.0.{name}"] = tensor
    with pytest.raises(ConfigError, match=message):
        tensors_to_qwen(write_tensors(tmp_path / "changed", tensors), config_to_qwen2(CONFIG))


def test_q_k_and_v_with_different_act_order_are_refused(tmp_path: Path) -> None:
    write_gptq(TINY, tmp_path / "qwen", group_size=16, desc_act=True)
    there = write_qwen2(tmp_path / "qwen", tmp_path / "there")
    tensors = load_file(there / "model.safetensors")
    groups = tensors["model.layers.1.self_attn.k_proj.g_idx"]
    tensors["model.layers.1.self_attn.k_proj.g_idx"] = groups.flip(0).contiguous()
    with pytest.raises(ConfigError, match=r"layers.1.self_attn.k_proj.g_idx groups the inputs in another order"):
        tensors_to_qwen(write_tensors(tmp_path / "changed", tensors), load_json(there / "config.json"))
