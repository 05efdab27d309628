"""Rehearsals against steps on tensors with data: the same storages at the same times, and no value is read."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException

import planning.fake_run
from data_utils.collate import Collator
from loading.checkpoint import load_checkpoint
from planning.rehearsal import BatchShape, Rehearsal
from tests.models import DELTA_NETS, write_later_checkpoint
from tests.unit.planning.shapes import rehearse_flags, write_config
from training.config.parsing import parse_args
from training.model import choose_embeddings, load_training_model
from training.trainer import QwenTrainer
from training.training_arguments import build_training_arguments

LENGTHS = (24, 40)


def facts(rehearsal: Rehearsal) -> dict[str, Any]:
    return {name: value for name, value in vars(rehearsal).items() if name != "seconds_taken"}


@pytest.mark.parametrize(
    ("model_type", "flags"),
    [
        ("qwen2", "--gradient_checkpointing False"),
        ("qwen2", "--use_lora --bf16 --trainable_embeddings full"),
        ("tied", "--bf16"),
        ("qwen", "--use_lora --loss full_logits --gradient_accumulation_steps 1 --gradient_checkpointing False"),
        ("qwen3", "--pure_bf16 --optim adamw_torch --padding_free False"),
        ("qwen3_5_text", "--use_lora --bf16"),
    ],
)
def test_tensors_with_data_take_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, flags: str
) -> None:
    is_tied = model_type == "tied"
    values = DELTA_NETS if model_type == "qwen3_5_text" else {}
    sizes: dict[str, Any] = {"head_dim": 8, "tie_word_embeddings": is_tied, **values}
    folder = write_config(tmp_path, "qwen2" if is_tied else model_type, **sizes)
    fake = facts(rehearse_flags(folder, flags, LENGTHS))
    monkeypatch.setattr(planning.fake_run, "FakeTensorMode", nullcontext)
    assert facts(rehearse_flags(folder, flags, LENGTHS)) == fake


@pytest.mark.parametrize("flags", ["", "--use_lora --lora_r 4", "--use_lora --bf16"])
def test_activations_are_what_a_loaded_model_saves_for_its_backward_pass(tmp_path: Path, flags: str) -> None:
    folder, flags = tmp_path / "model", f"{flags} --gradient_checkpointing False"
    write_later_checkpoint(folder, "qwen2")
    rehearsed = max(moment.components["activations"] for moment in rehearse_flags(folder, flags).moments.values())
    assert saved_bytes(folder, flags) == pytest.approx(rehearsed, rel=0.01)


def saved_bytes(folder: Path, flags: str) -> int:
    """Run a forward pass of a real model; return the bytes that autograd saves, without parameters and inputs."""
    argv = ["--model_name_or_path", str(folder), "--use_cpu", "True", *flags.split()]
    args, checkpoint = parse_args(argv), load_checkpoint(str(folder))
    model = load_training_model(
        checkpoint, args, build_training_arguments(args), choose_embeddings(args.lora, checkpoint)
    ).train()
    examples: Any = [{"input_ids": [5] * length, "labels": [5] * length} for length in LENGTHS]
    batch = Collator(0, is_padded=False)(examples)
    known = [*model.parameters(), *model.buffers(), *(value for value in batch.values() if isinstance(value, Tensor))]
    before = {tensor.untyped_storage()._cdata for tensor in known}
    saved: dict[int, int] = {}
    kept: list[Tensor] = []  # so that no address is used again

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with (
        torch.autocast("cpu", torch.bfloat16, enabled="--bf16" in flags),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        model(**batch, loss_only=True, use_cache=False)
    return sum(size for address, size in saved.items() if address not in before)


@pytest.mark.parametrize(("is_alone", "matrices"), [(True, 1), (False, 2)])
def test_gradients_of_a_tied_matrix_are_summed_in_one_of_them(tmp_path: Path, is_alone: bool, matrices: int) -> None:
    """In the gradient itself, or with an engine as autograd does without a dispatch mode: in one of its terms."""
    folder = write_config(tmp_path, vocab_size=8192, tie_word_embeddings=True)
    rehearsal = rehearse_flags(folder, "--gradient_accumulation_steps 1", is_alone=is_alone)
    gradient = rehearsal.moments["backward"].components
    assert gradient["gradients"] + gradient["loss"] + gradient["workspace"] < (matrices + 0.5) * 4 * 8192 * 32


def test_result_does_not_depend_on_the_seed(tmp_path: Path) -> None:
    folder = write_config(tmp_path)
    results = [facts(rehearse_flags(folder, f"--use_lora --bf16 --seed {seed}", device_type="cuda")) for seed in (1, 2)]
    assert results[0] == results[1]


def test_read_of_a_value_within_the_step_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = QwenTrainer.training_step

    def reading(self: QwenTrainer, *args: Any, **kwargs: Any) -> Tensor:
        loss = own(self, *args, **kwargs)
        loss.item()
        return loss

    monkeypatch.setattr(QwenTrainer, "training_step", reading)
    with pytest.raises(DataDependentOutputException):
        rehearse_flags(write_config(tmp_path), "--use_lora", device_type="cuda")


def test_rehearsal_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random and accelerate's states, environment and folder stay as they are, so that a run can rehearse itself."""
    from accelerate import PartialState

    monkeypatch.chdir(tmp_path)
    folder = write_config(tmp_path / "model")
    shared, environment = dict(PartialState._shared_state), dict(os.environ)
    torch.manual_seed(3)
    first = torch.rand(2)
    torch.manual_seed(3)
    rehearse_flags(folder, "--use_lora --output_dir out")
    assert torch.equal(torch.rand(2), first)
    assert PartialState._shared_state == shared and dict(os.environ) == environment
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_evaluation_has_moments_of_its_own(tmp_path: Path) -> None:
    folder = write_config(tmp_path)
    plain = rehearse_flags(folder, "--use_lora")
    evaluated = rehearse_flags(folder, "--use_lora", evaluation=BatchShape((200, 200), 300))
    assert {name: evaluated.moments[name] for name in plain.moments} == plain.moments
    assert {"evaluation, block 0", "evaluation, block 1", "evaluation loss"} <= evaluated.moments.keys()
    assert evaluated.moments["evaluation loss"].components["gradients"] == 0
