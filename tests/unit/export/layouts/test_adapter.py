"""Adapters converted to the other layout: peft computes the same logits, for every kind of adapter."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from checkpoints.adapter import read_adapter
from checkpoints.files import load_json, save_json
from checkpoints.shards import open_checkpoint
from checkpoints.writing import save_source
from errors import ConfigError
from export.layouts.adapter_config import save_converted_adapter
from export.layouts.config import config_to_qwen2
from export.layouts.qwen2_names import Layout
from export.layouts.tensors import tensors_to_qwen2
from qwen_model.register import register_qwen
from tests.golden import assert_close
from tests.models import TINY, change_json, copy_tied

IDS = torch.tensor([[3, 5, 7, 1, 0, 39, 20, 3], [9, 8, 7, 700, 701, 4, 3, 2]])


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny Qwen v1 checkpoint in both layouts, plain and with tied embeddings."""
    folder = tmp_path_factory.mktemp("bases")
    tied = copy_tied(folder / "qwen-tied")
    return {
        "qwen": TINY, "qwen2": write_qwen2(TINY, folder / "qwen2"),
        "qwen-tied": tied, "qwen2-tied": write_qwen2(tied, folder / "qwen2-tied"),
    }  # fmt: skip


def write_qwen2(base: Path, folder: Path) -> Path:
    config = load_json(base / "config.json")
    save_source(tensors_to_qwen2(open_checkpoint(base), config), folder, 10**9)
    save_json(config_to_qwen2(config), folder / "config.json")
    return folder


def load_base(base: Path) -> Any:
    register_qwen()
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def make_adapter(base: Path, folder: Path, **options: Any) -> Path:
    """Save with peft a LoRA adapter whose trainable values are all random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(
            load_base(base), LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 12} | options)
        )
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(folder)
    return folder


def logits_of(base: Path, adapter: Path) -> Tensor:
    """Compute the logits with peft; check that it loads every tensor of the adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*missing adapter keys")
        model = PeftModel.from_pretrained(load_base(base), adapter).eval()
    with torch.no_grad():
        logits: Tensor = model(IDS).logits
    return logits


def convert(adapter: Path, layout: Layout, folder: Path) -> Path:
    folder.mkdir()
    save_converted_adapter(read_adapter(adapter), layout, folder)
    return folder


LINEAR = ["c_attn", "attn.c_proj", "w1", "w2", "mlp.c_proj"]
CASES: dict[str, dict[str, Any]] = {
    "all layers": {"target_modules": ["c_attn", "c_proj", "w1", "w2"]},
    "a regular expression": {"target_modules": r".*h\.1\..*(c_attn|w1)"},
    "without some": {"target_modules": LINEAR, "exclude_modules": ["h.0.attn.c_attn"]},
    "full names": {"target_modules": ["transformer.h.0.attn.c_attn", "h.1.mlp.c_proj"]},
    "every linear layer": {"target_modules": "all-linear"},
    "some layers": {"target_modules": LINEAR, "layers_to_transform": [1], "layers_pattern": "h"},
    "patterns": {
        "target_modules": LINEAR,
        "rank_pattern": {"h.0.attn.c_attn": 2, "mlp.c_proj": 6},
        "alpha_pattern": {r"h\.\d+\.attn\..*": 5, "w1": 30},
    },
    "rslora": {"target_modules": LINEAR, "use_rslora": True, "rank_pattern": {"c_attn": 3}},
    "dora": {"target_modules": LINEAR, "use_dora": True},
    "all biases": {"target_modules": LINEAR, "bias": "all"},
    "biases of LoRA's layers": {"target_modules": LINEAR, "bias": "lora_only"},
    "bias of B": {"target_modules": ["c_attn"], "lora_bias": True},
    "embedding and head": {"target_modules": ["c_attn"], "modules_to_save": ["wte", "lm_head"]},
    "whole modules": {"target_modules": ["w1"], "modules_to_save": ["ln_f", "h.0.mlp"]},
    "trained tokens": {"target_modules": ["c_attn"], "trainable_token_indices": [700, 3]},
    "trained tokens of both": {
        "target_modules": ["c_attn"],
        "trainable_token_indices": {"wte": [700, 3], "lm_head": [700, 5]},
    },
    "LoRA on the embedding": {"target_modules": ["c_attn", "wte", "lm_head"]},
}


@pytest.mark.parametrize("name", CASES)
def test_adapter_has_equal_logits_in_both_layouts(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    before = make_adapter(bases["qwen"], tmp_path / "before", **CASES[name])
    expected = logits_of(bases["qwen"], before)
    there = convert(before, "qwen2", tmp_path / "there")
    assert_close(logits_of(bases["qwen2"], there), expected, 1e-5, "in Qwen2's layout")
    back = convert(there, "qwen", tmp_path / "back")
    assert_close(logits_of(bases["qwen"], back), expected, 1e-5, "and back")
    # c_attn is one layer of the same rank again.
    old, new = (load_file(folder / "adapter_model.safetensors") for folder in (before, back))
    assert old.keys() == new.keys()
    assert all(torch.equal(tensor, new[key]) for key, tensor in old.items())
    base = load_base(bases["qwen"])
    with torch.no_grad():
        assert (base(IDS).logits - expected).abs().max() > 1e-2, "the adapter does nothing"


def test_adapter_of_tied_embeddings(bases: dict[str, Path], tmp_path: Path) -> None:
    options = {"target_modules": ["c_attn"], "trainable_token_indices": {"wte": [700, 701]}}
    before = make_adapter(bases["qwen-tied"], tmp_path / "before", **options)
    there = convert(before, "qwen2", tmp_path / "there")
    expected = logits_of(bases["qwen-tied"], before)
    assert_close(logits_of(bases["qwen2-tied"], there), expected, 1e-5)


QWEN2_CASES: dict[str, dict[str, Any]] = {
    "q, k and v apart": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]},
    "q and v only": {"target_modules": ["q_proj", "v_proj"]},
    "v of one block": {"target_modules": ["layers.1.self_attn.v_proj", "down_proj"]},
    "different ranks and factors": {
        "target_modules": ["q_proj", "k_proj", "v_proj", "gate_proj"],
        "rank_pattern": {"q_proj": 2, "layers.0.self_attn.v_proj": 5},
        "alpha_pattern": {"k_proj": 7},
    },
    "rslora": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "use_rslora": True},
    "dora": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "use_dora": True},
    "bias of B": {"target_modules": ["k_proj", "v_proj"], "lora_bias": True, "alpha_pattern": {"v_proj": 5}},
    "all biases": {"target_modules": ["q_proj", "up_proj"], "bias": "all"},
    "embedding and head": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "whole layers": {"target_modules": ["up_proj"], "modules_to_save": ["q_proj", "k_proj", "v_proj"]},
    "a regular expression": {"target_modules": r".*layers\.0\..*(q|k|gate)_proj"},
}


@pytest.mark.parametrize("name", QWEN2_CASES)
def test_qwen2_adapter_converts_to_c_attn(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    before = make_adapter(bases["qwen2"], tmp_path / "before", **QWEN2_CASES[name])
    expected = logits_of(bases["qwen2"], before)
    back = convert(before, "qwen", tmp_path / "back")
    assert_close(logits_of(bases["qwen"], back), expected, 1e-5)


def test_equal_a_keeps_the_rank_if_scales_differ(bases: dict[str, Path], tmp_path: Path) -> None:
    there = convert(make_adapter(TINY, tmp_path / "before", target_modules=["c_attn"]), "qwen2", tmp_path / "there")
    change_json(there / "adapter_config.json", alpha_pattern={"v_proj": 5})
    back = convert(there, "qwen", tmp_path / "back")
    assert load_json(back / "adapter_config.json")["r"] == 4
    assert_close(logits_of(TINY, back), logits_of(bases["qwen2"], there), 1e-5)


def test_adapter_config_names_modules_of_the_layout(tmp_path: Path) -> None:
    options = {
        "target_modules": ["c_attn", "c_proj"],
        "modules_to_save": ["wte", "lm_head"],
        "base_model_name_or_path": "Qwen/Qwen-7B",
    }
    before = make_adapter(TINY, tmp_path / "before", **options)
    (before / "run_summary.json").write_text('{"base_fingerprint": "f"}')
    change_json(before / "adapter_config.json", auto_mapping={"base_model_class": "QWenLMHeadModel"})
    there, back = convert(before, "qwen2", tmp_path / "there"), tmp_path / "back"
    config = load_json(there / "adapter_config.json")
    assert set(config["target_modules"]) == {"q_proj", "k_proj", "v_proj", "o_proj", "down_proj"}
    assert config["modules_to_save"] == ["embed_tokens", "lm_head"]
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (4, 12, {}, {})
    assert config["auto_mapping"] is None, "names the class of the old layout"
    assert load_json(there / "run_summary.json") == {"base_fingerprint": "f"}
    assert config["base_model_name_or_path"] == load_json(before / "adapter_config.json")["base_model_name_or_path"]
    back.mkdir()
    save_converted_adapter(read_adapter(there), "qwen", back, "another base")
    config = load_json(back / "adapter_config.json")
    assert set(config["target_modules"]) == {"c_attn", "attn.c_proj", "mlp.c_proj"}
    assert (config["modules_to_save"], config["base_model_name_or_path"]) == (["wte", "lm_head"], "another base")


def test_adapter_of_peft_0_6(bases: dict[str, Path], tmp_path: Path) -> None:
    """peft 0.6 saved pickles and had fewer options."""
    before = make_adapter(TINY, tmp_path / "before", target_modules=["c_attn", "w1"])
    expected = logits_of(TINY, before)
    torch.save(load_file(before / "adapter_model.safetensors"), before / "adapter_model.bin")
    (before / "adapter_model.safetensors").unlink()
    known = "base_model_name_or_path bias fan_in_fan_out inference_mode init_lora_weights layers_pattern lora_alpha "
    known += "layers_to_transform lora_dropout modules_to_save peft_type r target_modules task_type"
    config = load_json(before / "adapter_config.json")
    save_json({key: config[key] for key in known.split()}, before / "adapter_config.json")
    there = convert(before, "qwen2", tmp_path / "there")
    assert_close(logits_of(bases["qwen2"], there), expected, 1e-5)


# ----------------------------------------------------------------------------------------------------------- bad input


def drop(*endings: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.endswith(endings)}


def renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def narrowed(part: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor[:-4].clone() if part in name else tensor for name, tensor in tensors.items()}

    return change


@pytest.mark.parametrize(
    ("base", "layout", "options", "change", "message"),
    [
        ("qwen", "qwen", {"target_modules": ["c_attn"]}, None, "are those of qwen already"),
        ("qwen", "qwen2", {"target_modules": ["w1"]}, renamed("mlp.w1", "mlp.w9"), "counterpart in the layout of Qwen"),
        ("qwen2", "qwen", {"target_modules": ["q_proj"]}, renamed("q_proj", "q_norm"), "no counterpart in .* Qwen v1"),
        ("qwen", "qwen2", {"target_modules": ["c_attn"]}, narrowed("lora_B"), "cannot be split among q, k and v"),
        ("qwen2", "qwen", {"target_modules": ["q_proj", "k_proj"]}, narrowed("k_proj.lora_B"), "different sizes"),
        ("qwen2", "qwen", {"target_modules": ["q_proj"], "use_dora": True}, None, "has no counterpart in all"),
        ("qwen2", "qwen", {"target_modules": ["up_proj"], "modules_to_save": ["v_proj"]}, None, "no counterpart"),
    ],
)  # fmt: skip
def test_adapter_without_counterpart_is_refused(
    base: str,
    layout: Layout,
    options: dict[str, Any],
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None,
    message: str,
    bases: dict[str, Path],
    tmp_path: Path,
) -> None:
    adapter = make_adapter(bases[base], tmp_path / "before", **options)
    file = adapter / "adapter_model.safetensors"
    if change is not None:
        save_file(change(load_file(file)), file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=message):
        convert(adapter, layout, tmp_path / "after")
