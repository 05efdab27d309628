"""The quantisation that the config files of a checkpoint declare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from checkpoints.model_config import Quantization, find_quantization, load_base_quantization
from checkpoints.shards import open_checkpoint
from errors import ConfigError

AUTO_GPTQ = {
    "bits": 4, "group_size": 128, "damp_percent": 0.01, "desc_act": False, "static_groups": False, "sym": True,
    "true_sequential": True, "model_name_or_path": None, "model_file_base_name": "model",
}  # fmt: skip
INT4 = Quantization("gptq", 4, 128, zero_offset=1)


def folder(tmp_path: Path, config: Any = None, **files: Any) -> Path:
    model = {"model_type": "qwen", **({} if config is None else {"quantization_config": config})}
    for name, content in {"config": model, **files}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, None),
        ({**AUTO_GPTQ, "quant_method": "gptq"}, INT4),
        (AUTO_GPTQ, INT4),
        ({**AUTO_GPTQ, "bits": 8, "quant_method": "gptq", "desc_act": True}, Quantization("gptq", 8, 128, 1)),
        ({**AUTO_GPTQ, "group_size": -1}, Quantization("gptq", 4, -1, 1)),
        ({**AUTO_GPTQ, "quant_method": "gptq", "checkpoint_format": "gptq_v2"}, Quantization("gptq", 4, 128, 0)),
        ({**AUTO_GPTQ, "model_file_base_name": "gptq_model-4bit-128g"},
         Quantization("gptq", 4, 128, 1, "gptq_model-4bit-128g")),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True,
          "modules_to_not_convert": None}, Quantization("awq", 4, 128)),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM"}, Quantization("awq", 4, 64)),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, Quantization("nf4", 4)),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, Quantization("int8", 8)),
        ({"load_in_4bit": True}, Quantization("fp4", 4)),
    ],
)  # fmt: skip
def test_quantization_config_of_config_json(config: Any, expected: Quantization | None, tmp_path: Path) -> None:
    assert find_quantization(folder(tmp_path, config)) == expected


def test_config_files_of_auto_gptq_and_autoawq(tmp_path: Path) -> None:
    assert find_quantization(folder(tmp_path, quantize_config=AUTO_GPTQ)) == INT4
    (tmp_path / "quantize_config.json").unlink()
    awq = {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}
    assert find_quantization(folder(tmp_path, quant_config=awq)) == Quantization("awq", 4, 128)


def test_folder_without_model_config_is_not_quantised(tmp_path: Path) -> None:
    assert find_quantization(tmp_path / "absent") is None
    (tmp_path / "quantize_config.json").write_text(json.dumps(AUTO_GPTQ))
    assert find_quantization(tmp_path) is None  # such as an adapter's folder


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "hqq"}, "weights quantised by hqq cannot be read"),
        ({}, "weights quantised by an unnamed method cannot be read"),
        ({**AUTO_GPTQ, "bits": 3}, "3 bits cannot be read, only 2 or 4 or 8"),
        ({**AUTO_GPTQ, "bits": "4"}, 'quantization_config.bits is "4"'),
        ({**AUTO_GPTQ, "group_size": 0}, "group_size is 0"),
        ({**AUTO_GPTQ, "checkpoint_format": "marlin"}, "GPTQ weights in the layout 'marlin' cannot be read"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"},
         "AWQ weights in the layout 'gemv' cannot be read, only 'gemm'"),
        ({"quant_method": "awq", "bits": 8, "group_size": 128}, "8 bits cannot be read, only 4"),
        ({"quant_method": "awq", "group_size": 128}, "bits is null"),
        ({"quant_method": "bitsandbytes"}, "quantised by bitsandbytes with neither of load_in_4bit and load_in_8bit"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "quantised by bitsandbytes with both of load_in_4bit and"),
    ],
)  # fmt: skip
def test_unsupported_quantisation_is_refused(config: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        find_quantization(folder(tmp_path, config))
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: {message}")


def test_weights_are_found_under_the_name_in_the_config(golden_small: Path, tmp_path: Path) -> None:
    weights = (golden_small / "tiny-qwen-small" / "model.safetensors").read_bytes()
    (tmp_path / "gptq_model-4bit-128g.safetensors").write_bytes(weights)
    with pytest.raises(ConfigError, match="holds no weights"):
        open_checkpoint(folder(tmp_path))
    named = {**AUTO_GPTQ, "model_file_base_name": "gptq_model-4bit-128g"}
    assert "lm_head.weight" in open_checkpoint(folder(tmp_path, quantize_config=named))
    # A path that leads out of the folder is ignored.
    assert find_quantization(folder(tmp_path, {**named, "model_file_base_name": "../other"})) == INT4


def test_quantisation_of_an_adapters_base(tmp_path: Path) -> None:
    assert load_base_quantization(tmp_path) is None
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (tmp_path / "base_quantization.json").write_text(json.dumps(config))
    assert load_base_quantization(tmp_path) == Quantization("nf4", 4)


def test_text_form() -> None:
    assert str(INT4) == "GPTQ, 4 bits, groups of 128"
    assert str(Quantization("awq", 4, -1)) == "AWQ, 4 bits, one group per row"
    assert str(Quantization("int8", 8)) == "8-bit by bitsandbytes"
