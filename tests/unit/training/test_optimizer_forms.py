"""Optimizers with a training and an evaluation form: results have the latter, and runs resume from the former."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer

from tests.commands import finetune_here, logged_losses
from tests.models import CONVERSATIONS, TINY, write_conversations
from training.optimizer_forms import has_forms, set_form


class AveragingSGD(torch.optim.SGD):
    """SGD whose evaluation form is the mean of the parameters over the steps, like that of schedule-free optimizers."""

    is_training = True

    def step(self, closure: Any = None) -> Any:
        assert self.is_training, "a step needs the training form"
        result = super().step(closure)
        for parameter in self._parameters():
            state = self.state[parameter]
            state["steps"] = state.get("steps", torch.tensor(0)) + 1
            mean = state.setdefault("mean", torch.zeros_like(parameter))
            mean += (parameter.detach() - mean) / state["steps"]
        return result

    def train(self) -> None:
        self._convert(True)

    def eval(self) -> None:
        self._convert(False)

    def _convert(self, training: bool) -> None:
        if training != self.is_training:
            self.is_training = training
            for parameter in self._parameters():
                if (mean := self.state[parameter].get("mean")) is not None:
                    other = mean.clone()
                    mean.copy_(parameter.detach())
                    parameter.data.copy_(other)

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]


class TurningSGD(AveragingSGD):
    """AveragingSGD that goes back from its third step on, so that the second one has the best model."""

    def step(self, closure: Any = None) -> Any:
        goes_back = self.state[self._parameters()[0]].get("steps", 0) >= 2
        for group in self.param_groups:
            group["maximize"] = goes_back
        return super().step(closure)


@pytest.fixture(autouse=True)
def averaging(monkeypatch: pytest.MonkeyPatch) -> None:
    choose_optimizer(monkeypatch, AveragingSGD)


def choose_optimizer(monkeypatch: pytest.MonkeyPatch, optimizer: type) -> None:
    def choose(args: Any, model: Any = None) -> tuple[type, dict[str, Any]]:
        return optimizer, {"lr": args.learning_rate}

    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(choose))


EVALUATE = ("--eval_strategy", "steps", "--eval_steps", 1)
BEST = (*EVALUATE, "--load_best_model_at_end")


def run(output: Path, steps: int, *flags: object, rate: float = 0.5) -> dict[str, Tensor]:
    """Train, and return the adapter that was saved."""
    folder = output.parent
    finetune_here(
        "--model_name_or_path", TINY, "--data_path", write_conversations(folder / "train.json"), "--eval_data_path",
        write_conversations(folder / "eval.json", CONVERSATIONS[:2]), "--output_dir", output, "--max_steps", steps,
        "--use_lora", "--lora_r", 2, "--per_device_train_batch_size", 2, "--learning_rate", rate, "--logging_steps", 1,
        "--lr_scheduler_type", "constant", "--save_strategy", "steps", "--save_steps", 1, *flags,
    )  # fmt: skip
    return adapter(output)


def adapter(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return dict(load_file(folder / "adapter_model.safetensors"))


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_result_is_the_evaluation_form_whether_or_not_an_evaluation_came_last(tmp_path: Path) -> None:
    results = [run(tmp_path / str(number), 3, *flags) for number, flags in enumerate([(), EVALUATE])]
    assert equal(*results)
    steps = [adapter(tmp_path / "1" / f"checkpoint-{step}") for step in (1, 2, 3)]
    for name, mean in results[0].items():
        torch.testing.assert_close(mean, sum(step[name] for step in steps) / 3)
    assert not equal(results[0], steps[-1])  # checkpoints have the training form


@pytest.mark.parametrize("flags", [(), EVALUATE, BEST])
def test_a_resumed_run_ends_like_an_uninterrupted_one(tmp_path: Path, flags: tuple[object, ...]) -> None:
    expected = run(tmp_path / "whole", 4, *flags)
    shutil.copytree(tmp_path / "whole", tmp_path / "old")
    resumed = run(tmp_path / "new", 4, *flags, "--resume_from_checkpoint", tmp_path / "old" / "checkpoint-2")
    assert equal(resumed, expected)


@pytest.mark.parametrize("flags", [(), ("--save_only_model",)])
def test_the_best_model_is_the_evaluation_form_of_its_step(
    tmp_path: Path, flags: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    choose_optimizer(monkeypatch, TurningSGD)
    result = run(tmp_path / "best", 4, *BEST, *flags, rate=0.5)
    losses = logged_losses(tmp_path / "best", "eval_loss")
    assert losses.index(min(losses)) == 1
    assert equal(result, run(tmp_path / "short", 2, rate=0.5))
    assert equal(result, adapter(tmp_path / "best" / "checkpoint-2")) == bool(flags)


def test_other_optimizers_have_no_forms() -> None:
    layer = nn.Linear(2, 2)
    plain, averaging = torch.optim.SGD(layer.parameters(), 0.1), AveragingSGD(layer.parameters(), 0.1)
    assert (has_forms(plain), has_forms(averaging), has_forms(None)) == (False, True, False)
    for optimizer in (plain, averaging, None):
        set_form(optimizer, training=False)
    assert not averaging.is_training
