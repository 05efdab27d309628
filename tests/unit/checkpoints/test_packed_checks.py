"""Stored tensors of quantised layers are compared with each other and with the config before they are used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints.dequantized_reader import DequantizedReader, open_dequantized
from checkpoints.model_config import Quantization
from checkpoints.shards import open_checkpoint
from errors import ConfigError
from tests.models import TINY, change_json
from tests.quantized import write_awq, write_gptq

LAYER = "transformer.h.0.mlp.w1"  # 32 inputs, 64 outputs
Parts = dict[str, Tensor]
Change = Callable[[Parts], object]


def change(folder: Path, edit: Change) -> None:
    """Edit the stored tensors of one layer, by the last part of their names."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    parts = {name.rpartition(".")[2]: tensors.pop(name) for name in list(tensors) if name.startswith(f"{LAYER}.")}
    edit(parts)
    save_file(tensors | {f"{LAYER}.{part}": tensor for part, tensor in parts.items()}, file)


def refuses(folder: Path, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_dequantized(folder, torch.float16)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def replaced(part: str, make: Callable[[Tensor], Tensor]) -> Change:
    return lambda parts: parts.update({part: make(parts[part])})


def with_first(value: int) -> Callable[[Tensor], Tensor]:
    return lambda groups: torch.cat([torch.tensor([value], dtype=groups.dtype), groups[1:]])


COMMON: dict[str, tuple[Change, str]] = {
    "narrow words": (replaced("qweight", lambda each: each.to(torch.int16)), "qweight is stored as int16"),
    "floating words": (replaced("qzeros", lambda each: each.float()), "qzeros is stored as float32"),
    "integer scales": (replaced("scales", lambda each: each.to(torch.int32)), "scales is stored as int32"),
    "flat words": (replaced("qweight", lambda each: each.flatten()), "qweight has the shape [256], not 2 dimension(s)"),
    "no words": (replaced("qweight", lambda each: each[:0]), "qweight has the shape [0, "),
    "more scales": (replaced("scales", lambda each: each.repeat(2, 1)), "scales has the shape [2, 64], "),
    "fewer zeros": (replaced("qzeros", lambda each: each[:, 1:].contiguous()), "qzeros has the shape [1, 7], "),
}
GPTQ: dict[str, tuple[Change, str]] = {
    "group out of range": (replaced("g_idx", with_first(1)), "g_idx names group 1, the layer has groups 0 to 0"),
    "negative group": (replaced("g_idx", with_first(-1)), "g_idx names group -1"),
    "floating groups": (replaced("g_idx", lambda each: each.float()), "g_idx is stored as float32"),
    "fewer groups": (replaced("g_idx", lambda each: each[1:].clone()), "g_idx has the shape [31], "),
}


@pytest.mark.parametrize("fault", COMMON | GPTQ)
def test_faulty_gptq_layer(tmp_path: Path, fault: str) -> None:
    write_gptq(TINY, tmp_path / "base")
    edit, expected = (COMMON | GPTQ)[fault]
    change(tmp_path / "base", edit)
    refuses(tmp_path / "base", f"{LAYER}.{expected}")


@pytest.mark.parametrize("fault", COMMON)
def test_faulty_awq_layer(tmp_path: Path, fault: str) -> None:
    write_awq(TINY, tmp_path / "base")
    change(tmp_path / "base", COMMON[fault][0])
    refuses(tmp_path / "base", LAYER)


@pytest.mark.parametrize("bits", [2, 8])
def test_config_of_other_bits(tmp_path: Path, bits: int) -> None:
    write_gptq(TINY, tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    settings = json.loads(file.read_text())["quantization_config"]
    change_json(file, quantization_config=settings | {"bits": bits})
    refuses(tmp_path / "base", "")


@pytest.mark.parametrize("group_size", [8, 16, 64, -1])
def test_config_of_another_group_size(tmp_path: Path, group_size: int) -> None:
    """The layers of 64 inputs have two groups of 32."""
    write_gptq(TINY, tmp_path / "base")
    change(tmp_path / "base", lambda parts: parts.pop("g_idx"))
    open_dequantized(tmp_path / "base", torch.float16)  # in order, so that the group of each input is known
    file = tmp_path / "base" / "config.json"
    settings = json.loads(file.read_text())["quantization_config"]
    change_json(file, quantization_config=settings | {"group_size": group_size})
    refuses(tmp_path / "base", "has the shape")


@pytest.mark.parametrize("empty", [False, True])
def test_act_order_needs_the_group_of_each_input(tmp_path: Path, empty: bool) -> None:
    write_gptq(TINY, tmp_path / "base", desc_act=True)
    change(tmp_path / "base", replaced("g_idx", lambda each: each[:0]) if empty else lambda parts: parts.pop("g_idx"))
    refuses(tmp_path / "base", f"{LAYER}.g_idx is missing: with desc_act")


def test_layer_of_another_size_is_not_taken_for_padding(tmp_path: Path) -> None:
    write_gptq(TINY, tmp_path / "base")
    change_json(tmp_path / "base" / "config.json", intermediate_size=64)
    refuses(tmp_path / "base", "mlp.c_proj.weight has the shape [32, 64], larger than [32, 32] of config.json")


def with_state(**values: Any) -> Tensor:
    state = {"shape": [4, 32], "blocksize": 64, "dtype": "float32", "quant_type": "nf4"} | values
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


STATE = "weight.quant_state.bitsandbytes__nf4"
NF4_FAULTS: dict[str, Parts] = {
    "state that is no JSON": {STATE: torch.arange(9, dtype=torch.uint8)},
    "state of floats": {STATE: torch.rand(5)},
    "shape of words": {STATE: with_state(shape=["4", 32])},
    "shape of three": {STATE: with_state(shape=[4, 32, 1])},
    "no blocks": {STATE: with_state(blocksize=0)},
    "another size": {STATE: with_state(shape=[8, 32])},
    "another block size": {STATE: with_state(blocksize=128)},
    "wide values": {"weight": torch.zeros(64, 1, dtype=torch.int32)},
    "fewer values": {"weight": torch.zeros(63, 1, dtype=torch.uint8)},
    "integer scales": {"weight.absmax": torch.ones(2, dtype=torch.uint8)},
    "table of two": {"weight.quant_map": torch.rand(2)},
    "scales that are not described": {
        "weight.nested_absmax": torch.rand(1),
        "weight.nested_quant_map": torch.rand(256),
    },
}


@pytest.mark.parametrize("fault", ["", *NF4_FAULTS])
def test_faulty_nf4_layer(tmp_path: Path, fault: str) -> None:
    parts: Parts = {
        "weight": torch.zeros(64, 1, dtype=torch.uint8), "weight.absmax": torch.rand(2),
        "weight.quant_map": torch.rand(16), STATE: with_state(),
    }  # fmt: skip
    parts |= NF4_FAULTS.get(fault, {})
    save_file({f"h.0.w1.{name}": tensor for name, tensor in parts.items()}, tmp_path / "model.safetensors")
    reader, quantization = open_checkpoint(tmp_path), Quantization("nf4", 4)
    if not fault:
        assert DequantizedReader(reader, quantization, torch.float16).shape("h.0.w1.weight") == (4, 32)
        return
    with pytest.raises(ConfigError, match=r"^h\.0\.w1\.weight.* Copy config\.json"):
        DequantizedReader(reader, quantization, torch.float16)


@pytest.mark.parametrize(
    "parts", [{"weight": torch.zeros(4, 8)}, {"SCB": torch.ones(4, dtype=torch.int8)}, {"SCB": torch.ones(3)}]
)
def test_faulty_8bit_layer(tmp_path: Path, parts: Parts) -> None:
    whole = {"weight": torch.zeros(4, 8, dtype=torch.int8), "SCB": torch.ones(4)} | parts
    save_file({f"h.0.w1.{name}": tensor for name, tensor in whole.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"^h\.0\.w1\."):
        DequantizedReader(open_checkpoint(tmp_path), Quantization("int8", 8), torch.float16)
