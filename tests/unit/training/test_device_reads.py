"""Nothing in an optimizer step waits for the device, but for the one read that the log lines are made of.

A step runs on fake tensors, which have no values: reading one, or making a tensor whose size depends on one, raises.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import masking_utils

from loading.adapters import EmbeddingsPolicy
from loading.checkpoint import load_checkpoint
from tests.commands import PLAIN
from tests.models import TINY, write_conversations, write_later_checkpoint
from training.config.parsing import parse_args
from training.data import build_collator, build_train_dataset, load_data
from training.joined_rows import is_empty
from training.model import load_training_model
from training.trainer import QwenTrainer
from training.training_arguments import build_training_arguments

FLAGS = {
    "LoRA, rows": ("--use_lora", "--lora_r", 2),
    "LoRA and tokens, padded": ("--use_lora", "--lora_r", 2, "--padding_free", "False"),
    "full, rows": (),
    "full, padded, bf16": ("--padding_free", "False", "--bf16"),
    "full, rows, recomputed": ("--gradient_checkpointing", "True"),
    "full, smoothed": ("--label_smoothing_factor", 0.1),
}


def build_trainer(folder: Path, model: Path, *flags: object) -> QwenTrainer:
    words = [
        *PLAIN, "--model_name_or_path", model, "--data_path", write_conversations(folder / "train.json"),
        "--output_dir", folder / "out", "--use_cpu", "True", "--model_max_length", 64, "--disable_tqdm", "True",
        "--per_device_train_batch_size", 3, "--gradient_accumulation_steps", 2, *flags,
    ]  # fmt: skip
    args = parse_args([str(word) for word in words])
    checkpoint, training_arguments = load_checkpoint(str(model)), build_training_arguments(args)
    policy = EmbeddingsPolicy("chatml_tokens", "tested") if args.lora.use_lora else None
    return QwenTrainer(
        checkpoint,
        model=load_training_model(checkpoint, args, training_arguments, policy),
        args=training_arguments,
        data_collator=build_collator(args, checkpoint),
        train_dataset=build_train_dataset(args, checkpoint, load_data(args, training_arguments, checkpoint)["train"]),
    )


def make_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace parameters and buffers by fake ones; those that are tied stay so."""
    fakes: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in fakes:
                    fakes[id(parameter)] = nn.Parameter(mode.from_tensor(parameter.data), parameter.requires_grad)
                module._parameters[name] = fakes[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = mode.from_tensor(buffer)


def take_step(trainer: QwenTrainer, monkeypatch: pytest.MonkeyPatch, joins_rows: bool = False) -> None:
    """Take an optimizer step as ``Trainer._run_epoch`` does, on fake tensors, without the read of ``_read_step``."""
    mode = FakeTensorMode()
    trainer.joins_rows, trainer._budgets = joins_rows, {3: 10**6}
    monkeypatch.setattr(trainer, "_read_step", lambda norm: norm)
    assert trainer.model is not None
    make_fake(trainer.model, mode)
    trainer.accelerator.device_placement = False  # fake parameters cannot be moved
    loader = trainer.get_train_dataloader()
    batches = [
        {name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        for batch in list(loader)[:2]
    ]
    trainer._step_correct = mode.from_tensor(trainer._step_correct)
    model, _ = trainer._prepare_for_training(4, loader, None)
    with mode:
        samples, weight = trainer.get_batch_samples(iter(batches), 2, trainer.args.device)
        assert [is_empty(batch) for batch in samples] == [joins_rows, False]
        for batch in samples:
            trainer.training_step(model, batch, weight)
        norm = trainer._get_grad_norm(model, trainer._clip_grad_norm(model))
        assert norm is not None
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        model.zero_grad()


def forbid_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers build no mask: what it reads from the device for one, it does not read from fake tensors."""

    def fail(*args: Any, **kwargs: Any) -> None:
        pytest.fail("a mask is built")

    monkeypatch.setattr(masking_utils, "_preprocess_mask_arguments", fail)


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("model_type", ["qwen", "qwen2"])
def test_no_value_is_read_within_an_optimizer_step(
    name: str, model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = TINY if model_type == "qwen" else write_later_checkpoint(tmp_path / "model", model_type)
    forbid_masks(monkeypatch)
    take_step(build_trainer(tmp_path, model, *FLAGS[name]), monkeypatch, joins_rows="LoRA, rows" in name)


@pytest.mark.parametrize("model_type", ["qwen", "qwen2"])
def test_evaluations_of_padded_rows_build_no_mask_and_have_the_loss_of_rows_without_padding(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = TINY if model_type == "qwen" else write_later_checkpoint(tmp_path / "model", model_type)
    forbid_masks(monkeypatch)
    padded = evaluate(build_trainer(tmp_path, model, "--padding_free", "False"))
    assert padded == pytest.approx(evaluate(build_trainer(tmp_path, model)), rel=1e-6)


def evaluate(trainer: QwenTrainer) -> float:
    examples: Any = trainer.train_dataset
    return float(trainer.evaluate(examples)["eval_loss"])


def test_a_read_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build_trainer(tmp_path, TINY)
    compute = trainer.compute_loss

    def read(*args: Any, **kwargs: Any) -> Any:
        loss = compute(*args, **kwargs)
        assert loss.item() > 0
        return loss

    monkeypatch.setattr(trainer, "compute_loss", read)
    with pytest.raises(DataDependentOutputException):
        take_step(trainer, monkeypatch)


def test_the_default_optimizer_is_one_kernel(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path, TINY)
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["fused"]
