"""Running and quantising a model block by block gives the results of the whole model."""

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
from quantize.blocks import SampleStates, measure_gram, pop_blocks, stored_tensors, token_weights
from quantize.packed import Measurements, check_sizes, max_inputs, quantize_weights
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
    """Samples of different lengths; the first third of each is not trained."""
    generator = torch.Generator().manual_seed(0)
    result: list[UnweightedExample] = []
    for length in (30, 12, 51):
        ids = torch.randint(0, 690, (length,), generator=generator).tolist()
        result.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]})
    return result


@torch.no_grad()
def logits(model: Any, examples: list[UnweightedExample]) -> list[Tensor]:
    return [model(input_ids=torch.tensor([example["input_ids"]])).logits for example in examples]


def test_perplexity_equals_that_of_the_whole_model(model: Any, examples: list[UnweightedExample]) -> None:
    losses = []
    for output, example in zip(logits(model, examples), examples, strict=True):
        labels = torch.tensor(example["labels"])
        chosen = labels[1:] != -100
        likelihoods = output[0, :-1].log_softmax(-1)[chosen, labels[1:][chosen]]
        losses += (-likelihoods).tolist()
    states = SampleStates(model, examples, CPU)
    for index, block in pop_blocks(model, CPU, "test"):
        states.advance(index, block)
    measured = states.answer_losses(model)
    assert measured.counts == (20, 8, 34) and len(losses) == 20 + 8 + 34
    assert measured.sums[1] == pytest.approx(sum(losses[20:28]), rel=1e-4)
    assert measured.perplexity == pytest.approx(torch.tensor(losses).mean().exp().item(), rel=1e-4)


def test_capturing_block_inputs_does_not_change_the_model(model: Any, examples: list[UnweightedExample]) -> None:
    before = logits(model, examples)
    states = SampleStates(model, examples, CPU)
    assert [tuple(each.shape[:2]) for each in states.states] == [(1, 30), (1, 12), (1, 51)]
    assert all(torch.equal(one, other) for one, other in zip(before, logits(model, examples), strict=True))


def test_16_bit_model_computes_in_float32(
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
        states = SampleStates(each, examples, CPU)
        for index, block in pop_blocks(each, CPU, "test"):
            states.advance(index, block)
        perplexities.append(states.answer_losses(each).perplexity)
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-5)


def test_gram_matrix_is_that_of_the_layers_inputs(model: Any, examples: list[UnweightedExample]) -> None:
    block, names = blocks_of(model)[0], architecture_of_model(model).linear_layers
    seen: list[Tensor] = []
    for name in names:
        block.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    logits(model, examples)
    for i, name in enumerate(names):
        samples = seen[i : 3 * len(names) : len(names)]
        inputs = torch.cat([x * token_weights(x).sqrt()[:, None] for x in samples])
        measured = measure_gram(SampleStates(model, examples, CPU), 0, block, name)
        torch.testing.assert_close(measured, inputs.T @ inputs / len(inputs))


def test_token_weights() -> None:
    """Half by token, half by energy: without a massive token both are the same. The first token counts more."""
    inputs = torch.nn.functional.normalize(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(token_weights(inputs), torch.tensor([12.0] + 49 * [2.0]))
    inputs[7] *= 100
    shares = token_weights(inputs) * inputs.square().sum(1)
    assert shares[7] / shares.sum() == pytest.approx(0.5, abs=0.1)
    assert all(share > 0.9 for share in shares), "no other token is ignored"


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_other_tensors_are_unchanged(
    checkpoint: Checkpoint, model: Any, examples: list[UnweightedExample], method: Any
) -> None:
    expected = {name: tensor.clone() for name, tensor in stored_tensors(model)}
    quantization = Quantization(method, 4, 32, zero_offset=int(method == "gptq"))
    calibration, *held_out = (SampleStates(model, examples, CPU) for _ in range(3))
    measured = Measurements(*held_out)
    written = dict(quantize_weights(model, quantization, calibration, measured, torch.float32))
    architecture = architecture_of_model(model)
    layers = {f"{architecture.blocks}.{index}.{name}" for index in range(2) for name in architecture.linear_layers}
    assert {name.removesuffix(".qweight") for name in written if name.endswith(".qweight")} == layers
    assert measured.errors.keys() == layers and all(0 < error < 0.5 for error in measured.errors.values())
    others = expected.keys() - {f"{layer}.weight" for layer in layers}
    assert others == written.keys() - {name for name in written if name.rpartition(".")[2] in PARTS}
    assert all(torch.equal(written[name], expected[name]) for name in others)


PARTS = ("qweight", "qzeros", "scales", "g_idx")


def test_group_size_that_does_not_divide_a_layer_is_refused(tmp_path: Path) -> None:
    folder = write_later_checkpoint(tmp_path / "model", "qwen2")
    reader = open_checkpoint(folder)
    assert max_inputs(reader, "qwen2") == 64
    check_sizes(reader, "qwen2", Quantization("gptq", 4, 32, zero_offset=1))
    with pytest.raises(
        ConfigError, match=r"--group_size 64 does not divide the 32 inputs of self_attn.q_proj. Give.*32"
    ):
        check_sizes(reader, "qwen2", Quantization("gptq", 4, 64, zero_offset=1))
