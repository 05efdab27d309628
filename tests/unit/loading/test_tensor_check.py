"""A checkpoint has exactly the tensors of the model in its config.json: names, shapes, kind of dtype."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints.dequantized_reader import open_dequantized
from errors import ConfigError
from loading.tensor_check import check_tensors
from qwen_model.architectures import ARCHITECTURES, architecture_of
from tests.models import TINY, change_json, copy_checkpoint, copy_tied, write_later_checkpoint
from tests.quantized import write_awq, write_gptq

Change = Callable[[dict[str, Tensor]], object]


@pytest.fixture(params=ARCHITECTURES)
def model_type(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(model_type: str, tmp_path: Path) -> Path:
    """A tiny checkpoint of each row of the table of architectures."""
    if model_type == "qwen":
        return copy_checkpoint(tmp_path / "model")
    return write_later_checkpoint(tmp_path / "model", model_type)


def change(folder: Path, edit: Change) -> None:
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def check(folder: Path) -> None:
    check_tensors(folder, open_dequantized(folder, torch.float16))


def refuses(folder: Path, *expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(folder)
    message = str(caught.value)
    assert all(part in message for part in expected), message
    assert "\n" not in message and len(message) < 800 and str(folder) in message


def test_whole_checkpoints_pass(folder: Path) -> None:
    check(folder)


def test_missing_tensors_are_named(folder: Path, model_type: str) -> None:
    layer, names = f"{architecture_of(model_type).blocks}.1", load_file(folder / "model.safetensors").keys()
    lost = [f"{layer}.{name}.weight" for name in architecture_of(model_type).linear_layers]
    lost = [name for name in lost if name in names]
    change(folder, lambda tensors: [tensors.pop(name) for name in lost])
    refuses(folder, f"{len(lost)} tensors are missing: ", lost[0], f"and {len(lost) - 3} more")


def test_number_of_layers(folder: Path, model_type: str) -> None:
    blocks = architecture_of(model_type).blocks
    change_json(folder / "config.json", num_hidden_layers=1, layer_types=None)
    refuses(folder, f"config.json has 1 layers (num_hidden_layers), the weights have 2, also {blocks}.1")
    change_json(folder / "config.json", num_hidden_layers=1000)
    refuses(folder, f"the weights have 2, the first that is missing is {blocks}.2")
    change_json(folder / "config.json", num_hidden_layers=2)
    change(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(f"{blocks}.0.")])
    refuses(folder, f"the first that is missing is {blocks}.0")


def test_old_name_of_the_number_of_layers(tmp_path: Path) -> None:
    folder = copy_checkpoint(tmp_path / "model", num_hidden_layers=None, n_layer=2)
    check(folder)
    change_json(folder / "config.json", n_layer=1)
    refuses(folder, "config.json has 1 layers")


@pytest.mark.parametrize("extra", ["transformer.visual.conv1.weight", "v_head.summary.weight", "lm_head.scale"])
def test_tensors_of_other_models_are_refused(folder: Path, extra: str) -> None:
    """Training would drop them, and config.json would still name what they belong to."""
    change(folder, lambda tensors: tensors.update({extra: torch.ones(4)}))
    refuses(folder, "1 tensors are not part of a Qwen", extra)


def test_wrong_shapes_and_dtypes(folder: Path, model_type: str) -> None:
    architecture = architecture_of(model_type)
    norm, width = f"{architecture.norm}.weight", 32
    change(folder, lambda tensors: tensors.update({norm: torch.ones(width + 1)}))
    refuses(folder, f"1 tensors have another shape: {norm} [{width + 1}]; the first needs [{width}]")
    change(folder, lambda tensors: tensors.update({norm: torch.ones(width, dtype=torch.int8)}))
    refuses(folder, f"{norm} is stored as int8")


def test_vocabulary_of_another_size(folder: Path, model_type: str) -> None:
    embedding = architecture_of(model_type).embedding_weight
    change(folder, lambda tensors: tensors.update({embedding: tensors[embedding][:-8].clone()}))
    refuses(folder, embedding, "have another shape")


def test_harmless_tensors_pass(folder: Path, model_type: str) -> None:
    """Tables that every model computes, and biases of zeros."""
    architecture = architecture_of(model_type)
    block = f"{architecture.blocks}.1"
    without_bias = next(name for name in architecture.linear_layers[::-1] if name not in architecture.biased_layers)
    bias = f"{block}.{without_bias}.bias"
    extras = {f"{block}.attn.rotary_emb.inv_freq": torch.ones(4), f"{block}.attn.masked_bias": torch.tensor(-1e4)}
    change(folder, lambda tensors: tensors.update(extras | {bias: torch.zeros(7)}))
    check(folder)
    change(folder, lambda tensors: tensors.update({bias: torch.ones(7)}))
    refuses(folder, "1 tensors are not part of", bias)


def test_copy_of_a_tied_head(tmp_path: Path) -> None:
    folder = copy_tied(tmp_path / "model")
    check(folder)
    change(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["transformer.wte.weight"].clone()}))
    check(folder)
    change(folder, lambda tensors: tensors["lm_head.weight"][7].add_(1))
    refuses(folder, "lm_head.weight differs from transformer.wte.weight, but tie_word_embeddings is true")


def test_layers_of_two_kinds(tmp_path: Path) -> None:
    folder, layer = write_later_checkpoint(tmp_path / "model", "qwen3_5_text"), "model.layers.0"
    change_json(folder / "config.json", layer_types=["full_attention", "linear_attention"])
    what = "its weights are not those of its config.json: layer_types of config.json has full_attention for layer 0, "
    refuses(folder, what + "its tensors are those of linear_attention. Copy config.json")
    change_json(folder / "config.json", layer_types=["linear_attention", "full_attention"])
    change(folder, lambda tensors: tensors.pop(f"{layer}.linear_attn.conv1d.weight"))
    refuses(folder, f"1 tensors are missing: {layer}.linear_attn.conv1d.weight")
    change_json(folder / "config.json", layer_types=["linear_attention", "hyper_attention"])
    refuses(folder, "layer_types")
    change_json(folder / "config.json", layer_types=["linear_attention"])
    refuses(folder, "layer_types")


def test_unknown_architectures_are_not_judged(tmp_path: Path) -> None:
    check(copy_checkpoint(tmp_path / "model", model_type="llama", num_hidden_layers=9))


def test_contradictory_config_is_refused_in_one_line(folder: Path) -> None:
    change_json(folder / "config.json", hidden_size=33)
    refuses(folder, "config.json")


@pytest.mark.parametrize("write", [write_gptq, write_awq])
def test_quantised_checkpoints(tmp_path: Path, write: Callable[..., Any]) -> None:
    for name, source in (("v1", TINY), ("later", write_later_checkpoint(tmp_path / "source", "qwen3"))):
        folder = tmp_path / name
        write(source, folder)
        check(folder)
        change_json(folder / "config.json", num_hidden_layers=9, layer_types=None)
        refuses(folder, "config.json has 9 layers (num_hidden_layers), the weights have 2")
