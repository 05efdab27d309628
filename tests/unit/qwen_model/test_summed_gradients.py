"""Gradients of embedding and head that are added in place: those of autograd, in one matrix, where nothing waits."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn

from qwen_model.fast_blocks import use_fast_blocks
from qwen_model.lean_models import LeanQwen2ForCausalLM
from qwen_model.summed_gradients import SummingEmbedding, gradient_of, summing_in_place
from tests.commands import Recorder, finetune_here
from tests.golden import relative_difference
from tests.models import CONVERSATIONS, write_conversations, write_later_checkpoint
from training.trainer_memory import MemoryTrainer

IDS = torch.tensor([[3, 5, 3, 0, 7, 3]])


def build_model(tied: bool, dtype: torch.dtype = torch.float32) -> Any:
    config = LeanQwen2ForCausalLM.config_class(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, pad_token_id=0, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LeanQwen2ForCausalLM(config).to(dtype).train()
    use_fast_blocks(model)
    return model


def accumulate(model: Any, in_place: bool, rows: int = 3) -> dict[str, Tensor]:
    for row in range(rows):
        ids = torch.randint(1, 300, (1, 20), generator=torch.Generator().manual_seed(row))
        with summing_in_place(in_place):
            model(input_ids=ids, labels=ids, loss_only=True, use_cache=False, num_items_in_batch=57).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulated_gradients_are_those_of_autograd(tied: bool, dtype: torch.dtype) -> None:
    expected, summed = (accumulate(build_model(tied, dtype), in_place) for in_place in (False, True))
    assert summed.keys() == expected.keys()
    for name, gradient in summed.items():
        assert gradient.dtype == dtype
        assert relative_difference(gradient, expected[name]) <= (1e-6 if dtype == torch.float32 else 1e-2), name


def test_autograd_gets_no_gradient_of_these_matrices() -> None:
    """They stay the same tensors from row to row, and what is there before the first is added to."""
    model = build_model(tied=True)
    weight = model.lm_head.weight
    weight.grad = before = torch.ones_like(weight)
    accumulate(model, in_place=True)
    fresh = accumulate(build_model(tied=True), in_place=True)["model.embed_tokens.weight"]
    assert weight.grad is before
    torch.testing.assert_close(before - 1, fresh, atol=1e-6, rtol=1e-5)


def test_a_row_of_padding_is_not_trained() -> None:
    layer, plain = SummingEmbedding(8, 4, padding_idx=3), nn.Embedding(8, 4, padding_idx=3)
    plain.weight = nn.Parameter(layer.weight.detach().clone())
    with summing_in_place():
        layer(IDS).square().sum().backward()
    plain(IDS).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)


@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_matrix_with_hooks_gets_its_gradient_from_autograd(hook: str) -> None:
    model, calls = build_model(tied=True), list[Tensor]()
    getattr(model.lm_head.weight, hook)(calls.append)
    summed = accumulate(model, in_place=True)
    assert len(calls) == 3
    for name, gradient in accumulate(build_model(tied=True), in_place=False).items():
        assert torch.equal(gradient, summed[name]), name


def test_frozen_matrices_and_passes_without_gradients_add_nothing() -> None:
    model = build_model(tied=True)
    with torch.no_grad():
        accumulate_loss(model)
    assert model.lm_head.weight.grad is None
    model.lm_head.weight.requires_grad_(False)
    assert "model.embed_tokens.weight" not in accumulate(model, in_place=True)


def accumulate_loss(model: Any, factor: float = 1.0) -> Any:
    with summing_in_place():
        return model(input_ids=IDS, labels=IDS, loss_only=True, use_cache=False).loss * factor


def test_a_loss_times_a_factor_is_refused_as_the_gradient_is_there_already() -> None:
    with pytest.raises(RuntimeError, match="has been added already, without this factor"):
        accumulate_loss(build_model(tied=True), 0.5).backward()


def test_a_gradient_that_is_missing_begins_with_zeros() -> None:
    weight = nn.Parameter(torch.ones(2, 3))
    assert torch.equal(gradient_of(weight), torch.zeros(2, 3)) and gradient_of(weight) is weight.grad


@pytest.mark.parametrize("kind", DistributedType)
def test_engines_wait_for_gradients_that_autograd_has(kind: DistributedType) -> None:
    """Runs of two ranks (``test_two_ranks.py``, ``test_engines.py``) would fail without them."""
    trainer: Any = SimpleNamespace(accelerator=SimpleNamespace(distributed_type=kind, scaler=None))
    assert MemoryTrainer._is_alone(trainer) == (kind is DistributedType.NO)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")  # it multiplies the loss
    assert not MemoryTrainer._is_alone(trainer)


FULL = ("--learning_rate", 0.1)
LORA = (
    "--use_lora", "--trainable_embeddings", "full", "--lora_dropout", 0, "--lora_r", 4, "--learning_rate", 0.1,
)  # fmt: skip


@pytest.mark.parametrize("flags", [FULL, LORA, (*FULL, "--gradient_checkpointing", True)])
@pytest.mark.parametrize("tied", [True, False])
def test_runs_have_the_gradients_of_autograd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[object, ...], tied: bool
) -> None:
    model = write_later_checkpoint(tmp_path / "model", "qwen2", tied=tied)
    data = write_conversations(tmp_path / "train.json", CONVERSATIONS)
    counted = count_sums(monkeypatch)

    def train(name: str) -> Recorder:
        return finetune_here(
            "--model_name_or_path", model, "--data_path", data, "--output_dir", tmp_path / name, "--max_steps", 2,
            "--gradient_accumulation_steps", 3, "--optim", "sgd", "--max_grad_norm", 0, "--save_strategy", "no", *flags,
        )  # fmt: skip

    summed = train("summed")
    assert counted
    monkeypatch.setattr(MemoryTrainer, "_is_alone", lambda self: False)
    counted.clear()
    expected = train("plain")
    assert not counted
    for step, (ours, theirs) in enumerate(zip(summed.gradients, expected.gradients, strict=True)):
        assert ours.keys() == theirs.keys()
        for name, gradient in ours.items():
            assert relative_difference(gradient, theirs[name]) <= (1e-6 if step == 0 else 1e-5), name


def count_sums(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Return a list of the matrices whose gradients are asked for to be added to."""
    counted: list[Tensor] = []

    def count(weight: Tensor) -> Tensor:
        counted.append(weight)
        return gradient_of(weight)

    for place in ("lean_loss", "summed_gradients"):
        monkeypatch.setattr(f"qwen_model.{place}.gradient_of", count)
    return counted
