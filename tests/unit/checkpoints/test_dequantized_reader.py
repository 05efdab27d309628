"""Reading quantised checkpoints under the names of the unquantised ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints.dequantized_reader import open_dequantized
from checkpoints.shards import open_checkpoint
from errors import ConfigError
from tests.models import TINY
from tests.quantized import write_awq, write_gptq

LAYER = "transformer.h.0.mlp.w1"


def test_names_shapes_and_values_are_those_of_the_unquantised_model(tmp_path: Path) -> None:
    """The biases of zeros that auto-gptq adds are not part of the model."""
    plain = open_checkpoint(TINY)
    for number, weights in enumerate((write_gptq(TINY, tmp_path / "0"), write_awq(TINY, tmp_path / "1"))):
        reader = open_dequantized(tmp_path / str(number), torch.float16)
        assert set(reader.names()) == set(plain.names())
        assert all(name in reader and reader.shape(name) == plain.shape(name) for name in plain.names())
        assert {reader.dtype(name) for name in plain.names()} == {torch.float16}
        assert all(torch.equal(reader.read(name), weight) for name, weight in weights.items())
        assert "transformer.h.0.mlp.w1.qweight" not in reader
    assert f"{LAYER}.bias" in open_checkpoint(tmp_path / "0")


def test_nonzero_bias_is_kept(tmp_path: Path) -> None:
    write_gptq(TINY, tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{LAYER}.bias"] += 1
    save_file(tensors, file)
    reader = open_dequantized(tmp_path / "base", torch.float16)
    assert f"{LAYER}.bias" in reader and "transformer.h.0.mlp.w2.bias" not in reader


def test_unquantised_checkpoint_is_unchanged() -> None:
    plain, reader = open_checkpoint(TINY), open_dequantized(TINY, torch.float64)
    assert torch.equal(reader.read("lm_head.weight"), plain.read("lm_head.weight"))
    assert reader.dtype("lm_head.weight") == plain.dtype("lm_head.weight") != torch.float64


def test_padding_of_a_quantiser_is_dropped(tmp_path: Path) -> None:
    """The layer is packed with more inputs and outputs than the model has."""
    weights = write_gptq(TINY, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    width = config["intermediate_size"] // 2
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"intermediate_size": 2 * (width - 8)}))
    reader = open_dequantized(tmp_path / "base", torch.float16)
    for name, expected in ((f"{LAYER}.weight", (width - 8, None)), (f"{LAYER[:-2]}c_proj.weight", (None, width - 8))):
        padded = weights[name]
        cropped = padded[: expected[0], : expected[1]]
        assert reader.shape(name) == tuple(cropped.shape) != tuple(padded.shape)
        assert torch.equal(reader.read(name), cropped) and torch.equal(reader.rows(name, 2, 5), cropped[2:5])
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"intermediate_size": 2 * (width + 8)}))
    with pytest.raises(ConfigError, match=rf"smaller than \[.*{width + 8}\] of config.json"):
        open_dequantized(tmp_path / "base", torch.float16)


def test_missing_part_is_refused(tmp_path: Path) -> None:
    write_gptq(TINY, tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"{LAYER}.scales"]
    save_file(tensors, file)
    with pytest.raises(ConfigError, match=rf"^{LAYER}\.scales is missing, but {LAYER} is quantised"):
        open_dequantized(tmp_path / "base", torch.float16)
