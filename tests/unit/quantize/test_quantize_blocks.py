"""A model block by block computes what it computes whole, and what AWQ moves between layers changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints.model_config import Quantization
from checkpoints.shards import open_checkpoint
from data_utils.encode import UnweightedExample
from errors import ConfigError
from loading.checkpoint import Checkpoint, load_checkpoint, load_model
from loading.quantized import compute_in_float32
from quantize.blocks import InputStatistics, Stream, measure_inputs, stored_tensors, take_blocks
from quantize.packed import _move_scales, check_sizes, most_inputs, quantize_weights
from qwen_model.block_runner import architecture_of_model, blocks_of
from tests.models import TINY, write_later_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["qwen", "qwen2", "qwen3"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    if request.param == "qwen":
        return load_checkpoint(str(TINY))
    folder = tmp_path_factory.mktemp("checkpoints") / request.param
    return load_checkpoint(str(write_later_checkpoint(folder, request.param)))


@pytest.fixture
def model(checkpoint: Checkpoint) -> Any:
    return load_model(checkpoint, torch.float32)


@pytest.fixture
def examples() -> list[UnweightedExample]:
    """Of different lengths, the first third of each not trained."""
    generator = torch.Generator().manual_seed(0)
    found: list[UnweightedExample] = []
    for length in (30, 12, 51):
        ids = torch.randint(0, 690, (length,), generator=generator).tolist()
        found.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]})
    return found


@torch.no_grad()
def logits(model: Any, examples: list[UnweightedExample]) -> list[Tensor]:
    return [model(input_ids=torch.tensor([example["input_ids"]])).logits for example in examples]


def test_the_perplexity_is_that_of_the_whole_model(model: Any, examples: list[UnweightedExample]) -> None:
    losses = []
    for output, example in zip(logits(model, examples), examples, strict=True):
        labels = torch.tensor(example["labels"])
        chosen = labels[1:] != -100
        likelihoods = output[0, :-1].log_softmax(-1)[chosen, labels[1:][chosen]]
        losses += (-likelihoods).tolist()
    stream = Stream(model, examples, CPU)
    for index, block in take_blocks(model, CPU, "test"):
        stream.pass_through(index, block)
    assert stream.targets == len(losses) == 20 + 8 + 34
    assert stream.perplexity(model) == pytest.approx(torch.tensor(losses).mean().exp().item(), rel=1e-4)


def test_a_model_is_as_it_was_after_its_arguments_were_noted(model: Any, examples: list[UnweightedExample]) -> None:
    before = logits(model, examples)
    stream = Stream(model, examples, CPU)
    assert [tuple(states.shape[:2]) for states in stream.states] == [(1, 30), (1, 12), (1, 51)]
    assert all(torch.equal(one, other) for one, other in zip(before, logits(model, examples), strict=True))


def test_a_model_stored_in_16_bits_computes_in_float32(
    checkpoint: Checkpoint, model: Any, examples: list[UnweightedExample]
) -> None:
    narrow = load_model(checkpoint, torch.bfloat16)
    compute_in_float32(narrow)
    wide = model
    with torch.no_grad():
        for name, parameter in wide.named_parameters():
            parameter.copy_(narrow.get_parameter(name))
    perplexities = []
    for each in (narrow, wide):
        stream = Stream(each, examples, CPU)
        for index, block in take_blocks(each, CPU, "test"):
            stream.pass_through(index, block)
        perplexities.append(stream.perplexity(each))
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-5)


def test_statistics_are_those_of_the_layers_inputs(model: Any, examples: list[UnweightedExample]) -> None:
    block, name = blocks_of(model)[0], architecture_of_model(model).linear_layers[-1]
    seen: list[Tensor] = []
    handle = block.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    logits(model, examples)
    handle.remove()
    inputs = torch.cat(seen)
    measured = measure_inputs(Stream(model, examples, CPU), 0, block, [name])[name]
    torch.testing.assert_close(measured.gram, inputs.T @ inputs / len(inputs))
    torch.testing.assert_close(measured.sizes, inputs.abs().mean(0))


def test_moving_scales_changes_no_logit(model: Any, examples: list[UnweightedExample]) -> None:
    before = logits(model, examples)
    generator, moved = torch.Generator().manual_seed(3), 0
    for block in blocks_of(model):
        for group in architecture_of_model(model).linear_groups:
            if group.scaled_by is not None:
                layers: Any = [block.get_submodule(name) for name in group.layers]
                width = layers[0].in_features
                inputs = InputStatistics(torch.eye(width), torch.ones(width))
                scales = torch.exp(torch.randn(width, generator=generator))
                changed = [layer.weight.detach().clone() for layer in layers]
                # In bfloat16 the norm cannot hold the exact quotient: the scales have to follow what it holds.
                _move_scales(block.get_submodule(group.scaled_by), layers, inputs, scales, torch.bfloat16)
                moved += sum(not torch.equal(a, b.weight) for a, b in zip(changed, layers, strict=True))
    assert moved >= 2 * 4
    for one, other in zip(before, logits(model, examples), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_what_is_not_quantised_stays(
    checkpoint: Checkpoint, model: Any, examples: list[UnweightedExample], method: Any
) -> None:
    expected = dict(stored_tensors(model))
    expected = {name: tensor.clone() for name, tensor in expected.items()}
    quantization = Quantization(method, 4, 32, zero_offset=int(method == "gptq"))
    streams = [Stream(model, examples, CPU) for _ in range(2)]
    written = dict(quantize_weights(model, quantization, streams[0], streams[1], torch.float32))
    architecture = architecture_of_model(model)
    layers = {f"{architecture.blocks}.{index}.{name}" for index in range(2) for name in architecture.linear_layers}
    assert {name.removesuffix(".qweight") for name in written if name.endswith(".qweight")} == layers
    kept = expected.keys() - {f"{layer}.weight" for layer in layers}
    assert kept == written.keys() - {name for name in written if name.rpartition(".")[2] in PARTS}
    if method == "gptq":
        assert all(torch.equal(written[name], expected[name]) for name in kept)


PARTS = ("qweight", "qzeros", "scales", "g_idx")


def test_a_group_size_that_divides_no_layer(tmp_path: Path) -> None:
    folder = write_later_checkpoint(tmp_path / "model", "qwen2")
    reader = open_checkpoint(folder)
    assert most_inputs(reader, "qwen2") == 64
    check_sizes(reader, "qwen2", Quantization("gptq", 4, 32, zero_offset=1))
    with pytest.raises(
        ConfigError, match=r"--group_size 64 does not divide the 32 inputs of self_attn.q_proj. Give.*32"
    ):
        check_sizes(reader, "qwen2", Quantization("gptq", 4, 64, zero_offset=1))
