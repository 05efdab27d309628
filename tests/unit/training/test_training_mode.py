"""The mode of a model: transformers sets it before every micro-batch, here only where it changes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.utils import extract_model_from_parallel
from torch import nn

from tests.commands import finetune_here
from tests.models import TINY, write_conversations
from training.trainer import QwenTrainer
from training.trainer_engines import keep_training_mode, skip_unused_deepspeed


def test_all_modules_train_in_training_and_none_in_evaluations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[tuple[bool, set[bool]]] = []
    compute = QwenTrainer.compute_loss

    def record(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        modes.append((self.is_in_train and not self.is_evaluating, {module.training for module in model.modules()}))
        return compute(self, model, *args, **kwargs)

    monkeypatch.setattr(QwenTrainer, "compute_loss", record)
    evaluate = QwenTrainer.evaluation_loop

    def evaluating(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.is_evaluating = True
        try:
            return evaluate(self, *args, **kwargs)
        finally:
            self.is_evaluating = False

    monkeypatch.setattr(QwenTrainer, "evaluation_loop", evaluating)
    monkeypatch.setattr(QwenTrainer, "is_evaluating", False, raising=False)

    data = write_conversations(tmp_path / "train.json")
    finetune_here(
        "--model_name_or_path", TINY, "--data_path", data, "--eval_data_path", data, "--output_dir", tmp_path / "out",
        "--use_lora", "--lora_dropout", 0.2, "--max_steps", 3, "--per_device_train_batch_size", 2,
        "--gradient_accumulation_steps", 2, "--eval_strategy", "steps", "--eval_steps", 1, "--eval_on_start",
        "--save_strategy", "no",
    )  # fmt: skip
    assert [is_training for is_training, _ in modes].count(True) == 6
    assert all(found == {is_training} for is_training, found in modes)


def test_modules_are_visited_only_when_the_mode_changes() -> None:
    class Counted(nn.Linear):
        visits = 0

        def train(self, mode: bool = True) -> Any:
            Counted.visits += 1
            return super().train(mode)

    inner = nn.Sequential(Counted(1, 1)).eval()
    model = nn.ModuleList([inner])
    Counted.visits = 0
    for _ in range(3):
        keep_training_mode(model, inner)
        model.train()
    assert Counted.visits == 1 and inner[0].training
    inner.eval()  # as an evaluation does, without the wrapper
    model.train()
    assert Counted.visits == 3 and inner[0].training


def test_a_model_is_unwrapped_without_importing_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    skip_unused_deepspeed()
    model = nn.Linear(1, 1)
    assert extract_model_from_parallel(model) is model
    assert "deepspeed" not in sys.modules
