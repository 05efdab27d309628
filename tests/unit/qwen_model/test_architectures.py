"""Every row of the architecture table agrees with the class it describes, and no other table lists model types."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from errors import ConfigError
from qwen_model.architectures import (
    ARCHITECTURES,
    EMBEDDING_WEIGHTS,
    HEAD,
    HEAD_WEIGHT,
    Architecture,
    architecture_of,
    block_shapes,
)
from qwen_model.block_runner import blocks_of, capture_block_inputs, run_block
from qwen_model.lean_models import model_class_of
from tests.golden import REPO
from tests.models import DELTA_NETS
from tests.unit.test_imports import ALL_SOURCES

SIZES = {
    "vocab_size": 80, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "kv_channels": 8, "seq_length": 64,
}  # fmt: skip


@pytest.fixture(params=ARCHITECTURES.values(), ids=lambda row: row.model_type)
def architecture(request: pytest.FixtureRequest) -> Architecture:
    row: Architecture = request.param
    return row


@pytest.fixture
def model(architecture: Architecture) -> Any:
    """The class that the toolkit loads, tiny, with only those sizes that its config knows."""
    torch.manual_seed(0)
    model_class = model_class_of(architecture.model_type)
    config_class = model_class.config_class
    known = inspect.signature(config_class.__init__).parameters
    sizes = {name: size for name, size in SIZES.items() if name in known}
    changes = DELTA_NETS if "linear_key_head_dim" in known else {}
    return model_class(config_class(**sizes | changes)).eval()


def test_model_type_and_classes(architecture: Architecture, model: Any) -> None:
    assert ARCHITECTURES[architecture.model_type] is architecture
    assert model.config.model_type == architecture.model_type
    assert type(model).__name__ == architecture.model_class
    assert architecture.saved_class in [base.__name__ for base in type(model).__bases__]


def test_signature_of_forward_is_the_parents(model: Any) -> None:
    """transformers reads from it whether ``generate`` may pass position ids and keep the last logits only."""
    assert inspect.signature(model.forward) == inspect.signature(super(type(model), model).forward)
    assert {"position_ids", "logits_to_keep"} <= inspect.signature(model.forward).parameters.keys()


def test_module_names(architecture: Architecture, model: Any) -> None:
    assert model.get_submodule(architecture.embedding) is model.get_input_embeddings()
    assert model.get_submodule(HEAD) is model.get_output_embeddings()
    assert isinstance(model.get_submodule(architecture.blocks), nn.ModuleList)
    parameters = {name.removesuffix(".weight") for name, _ in model.named_parameters()}
    outside = {name for name in parameters if not name.startswith(f"{architecture.blocks}.")}
    assert outside == {architecture.embedding, architecture.norm, HEAD}


def test_modules_that_are_not_split_are_the_blocks(model: Any) -> None:
    """FSDP2 fails at one that the model does not have."""
    assert {type(block).__name__ for block in blocks_of(model)} == set(model._no_split_modules)


def test_names_of_tensors_on_disk(architecture: Architecture, model: Any) -> None:
    assert {architecture.embedding_weight, HEAD_WEIGHT} <= model.state_dict().keys()
    assert architecture.embedding_weight in EMBEDDING_WEIGHTS
    assert architecture.embedding_modules == (architecture.embedding.split(".")[-1], HEAD)


def linear_layers(block: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def test_lora_targets_are_the_linear_layers_of_the_blocks(architecture: Architecture, model: Any) -> None:
    layers = {name for block in blocks_of(model) for name in linear_layers(block)}
    assert {name.split(".")[-1] for name in layers} == set(architecture.lora_targets)
    outside = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    outside = [name for name in outside if not name.startswith(f"{architecture.blocks}.")]
    assert not {name.split(".")[-1] for name in outside} & set(architecture.lora_targets)


def test_quantised_groups_cover_the_linear_layers_of_a_block(architecture: Architecture, model: Any) -> None:
    for block in blocks_of(model):
        layers = linear_layers(block)
        assert sorted(name for group in architecture.groups_of(layers) for name in group) == sorted(layers)


def test_biased_layers(architecture: Architecture, model: Any) -> None:
    for block in blocks_of(model):
        biased = {name for name, layer in linear_layers(block).items() if layer.bias is not None}
        assert biased == set(architecture.biased_layers) & linear_layers(block).keys()


def test_shapes_from_the_config(architecture: Architecture, model: Any) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for block in blocks_of(model):
        shapes |= {name: tuple(layer.weight.shape) for name, layer in linear_layers(block).items()}
    assert block_shapes(model.config.to_dict()) == shapes


def block_inputs(model: Any) -> Iterator[tuple[nn.Module, torch.Tensor, Any]]:
    states, arguments = capture_block_inputs(model, input_ids=torch.tensor([[5, 9, 33, 7, 21]]))
    for block, others in zip(blocks_of(model), arguments, strict=True):
        yield block, states, others


def test_layers_of_a_group_have_the_same_input(architecture: Architecture, model: Any) -> None:
    for block, states, arguments in block_inputs(model):
        inputs: dict[str, torch.Tensor] = {}

        def hook(name: str, inputs: dict[str, torch.Tensor] = inputs) -> Any:
            return lambda module, args: inputs.setdefault(name, args[0])

        for name, layer in linear_layers(block).items():
            layer.register_forward_pre_hook(hook(name))
        run_block(block, states, arguments)
        groups = architecture.groups_of(inputs)
        assert tuple(inputs) == tuple(name for group in groups for name in group), "the order of their computation"
        for group in groups:
            assert all(torch.equal(inputs[name], inputs[group[0]]) for name in group)


def test_whether_a_block_returns_a_tuple(architecture: Architecture, model: Any) -> None:
    for block, states, arguments in block_inputs(model):
        output: Any = block(states, **arguments)
        assert isinstance(output, tuple) == architecture.block_returns_tuple
        assert run_block(block, states, arguments).shape == states.shape


@pytest.mark.parametrize("model_type", ["llama", "no_model", ["qwen"]])
def test_unknown_model_type_is_refused(model_type: object) -> None:
    with pytest.raises(ConfigError, match=r"^folder/config\.json: model_type .* is not supported\. Use a checkpoint"):
        architecture_of(model_type, "folder/config.json")


def test_config_without_a_model_type_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^folder/config\.json: there is no model_type\. Use a checkpoint"):
        architecture_of(None, "folder/config.json")


def test_shapes_of_incomplete_configs() -> None:
    complete = {name: SIZES[name] for name in ("hidden_size", "num_attention_heads", "intermediate_size")}
    assert block_shapes({"model_type": "qwen", **complete})["attn.c_attn"] == (96, 32)
    assert block_shapes(complete) == {} == block_shapes({"model_type": "qwen"})
    assert block_shapes({"model_type": "qwen", **complete, "num_attention_heads": 0}) == {}
    others = block_shapes({"model_type": "mistral", **complete})
    assert others == block_shapes({"model_type": "qwen2", **complete})


def test_no_other_file_lists_model_types() -> None:
    """A new ``model_type`` must be one row: whoever lists them all has to name the newest."""
    newest = list(ARCHITECTURES)[-1]
    naming = {
        path.relative_to(REPO).as_posix()
        for path in ALL_SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value == newest
    }
    assert naming == {"qwen_model/architectures.py"}
