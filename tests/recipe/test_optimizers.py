"""Optimizers of few states: they keep less than AdamW does, train otherwise, and resume to the same bits."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.commands import finetune_here, logged_losses
from tests.models import CONVERSATIONS, TINY, write_conversations, write_later_checkpoint
from training.config.optimizers import OPTIMIZERS

LOW_RANK = ["--optim_target_modules", "all-linear", "--optim_args", "rank=4,update_proj_gap=2"]
# Flags, and the most that the saved states may take of AdamW's. Embedding and head, which GaLore and APOLLO leave as
# they are, are nine tenths of the tiny model.
CASES: dict[str, tuple[list[object], float]] = {
    "adafactor": ([], 0.2),
    "galore_adamw": (LOW_RANK, 0.95),
    "galore_adafactor": (LOW_RANK, 0.5),
    "apollo_adamw": (LOW_RANK, 0.95),
}


def train(folder: Path, optimizer: str, *flags: object, model: Path = TINY) -> dict[str, Tensor]:
    """Train all parameters for four steps, and return the weights that were saved."""
    data = write_conversations(folder.parent / "train.json", CONVERSATIONS * 2)
    finetune_here(
        "--model_name_or_path", model, "--data_path", data, "--output_dir", folder, "--max_steps", 4, "--save_steps", 2,
        "--save_strategy", "steps", "--logging_steps", 1, "--learning_rate", 1e-2, "--per_device_train_batch_size", 3,
        "--optim", optimizer, *flags,
    )  # fmt: skip
    return dict(load_file(folder / "model.safetensors"))


def size_of_states(folder: Path) -> int:
    return (folder / "checkpoint-4" / "optimizer.pt").stat().st_size


@pytest.fixture(scope="module")
def adamw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adamw") / "out"
    train(folder, "adamw_torch")
    return folder


@pytest.mark.parametrize("optimizer", CASES)
def test_an_optimizer_keeps_less_trains_otherwise_and_resumes(tmp_path: Path, adamw: Path, optimizer: str) -> None:
    flags, most = CASES[optimizer]
    module = OPTIMIZERS[optimizer].package[1]
    if module and importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    expected = train(tmp_path / "out", optimizer, *flags)
    assert size_of_states(tmp_path / "out") < most * size_of_states(adamw)
    losses, others = logged_losses(tmp_path / "out"), logged_losses(adamw)
    assert losses[0] == others[0] and losses[1:] != others[1:]
    assert min(losses[1:]) < losses[0]
    checkpoint = tmp_path / "out" / "checkpoint-2"
    resumed = train(tmp_path / "again", optimizer, *flags, "--resume_from_checkpoint", checkpoint)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())
    assert logged_losses(tmp_path / "again") == losses[2:]


def test_8_bit_states_are_smaller_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, where newer versions of bitsandbytes have these kernels too; finetune.py asks for a GPU.

    Parameters of less than 4,096 values and embeddings keep 32 bits.
    """
    pytest.importorskip("bitsandbytes")
    optimizer = "adamw_8bit"
    monkeypatch.setitem(OPTIMIZERS, optimizer, replace(OPTIMIZERS[optimizer], needs_gpu=False))
    base = write_later_checkpoint(tmp_path / "base", "qwen2", hidden_size=64)
    train(tmp_path / "adamw", "adamw_torch", model=base)
    expected = train(tmp_path / "out", optimizer, model=base)
    assert size_of_states(tmp_path / "out") < 0.75 * size_of_states(tmp_path / "adamw")
    assert logged_losses(tmp_path / "out")[1:] != logged_losses(tmp_path / "adamw")[1:]
    checkpoint = tmp_path / "out" / "checkpoint-2"
    resumed = train(tmp_path / "again", optimizer, "--resume_from_checkpoint", checkpoint, model=base)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())
