"""The end of a run: training samples reproduced, loss that did not fall, a change that is small beside 16 bits."""

from __future__ import annotations

import logging
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from checkpoints.training_samples import TrainingSample, TrainingSamples
from loading.checkpoint import load_checkpoint, load_model
from tests.commands import Recorder, finetune_here, read_json
from tests.models import CONVERSATIONS, TINY, copy_in_bfloat16, write_conversations
from training.learnt import describe_learnt, find_no_fall, measure_change, measure_samples, warn_of_little


def train(folder: Path, *flags: object) -> tuple[Recorder, dict[str, Any]]:
    """Train on four conversations, and return the run with what its summary says was learnt."""
    data = write_conversations(folder / "data.json", CONVERSATIONS[:4])
    run = finetune_here(
        "--model_name_or_path", TINY, "--data_path", data, "--output_dir", folder / "out", "--save_strategy", "no",
        "--lr_scheduler_type", "constant", *flags,
    )  # fmt: skip
    return run, read_json(folder / "out" / "run_summary.json")["learnt"]


@torch.no_grad()
def repeats(model: Any, sample: TrainingSample) -> bool:
    """Decode each trained stretch of a sample greedily, token by token, from what is before it."""
    ids, position = sample.ids, 1
    while position < len(ids):
        if sample.labels[position] < 0:
            position += 1
            continue
        written = ids[:position]
        while position < len(ids) and sample.labels[position] >= 0:
            written.append(int(model(input_ids=torch.tensor([written])).logits[0, -1].argmax()))
            position += 1
        if written != ids[:position]:
            return False
    return True


def test_the_summary_counts_the_answers_that_greedy_decoding_repeats(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, learnt = train(tmp_path, "--learning_rate", 1e-2, "--max_steps", 40)
    samples = TrainingSamples.read(tmp_path / "out").samples
    run.model.eval()
    repeated = sum(repeats(run.model, sample) for sample in samples)
    assert 1 <= learnt["reproduced"] == repeated
    assert learnt["samples"] == len(samples) == 4
    assert learnt["targets"] == sum(label >= 0 for sample in samples for label in sample.labels[1:])
    end_loss = read_json(tmp_path / "out" / "run_summary.json")["end_loss"]
    assert end_loss == pytest.approx(sum(run.losses()[-8:]) / 8)
    line = f"{repeated} of 4 training samples reproduced (greedy); {learnt['correct'] / learnt['targets']:.1%} of their"
    end = capfd.readouterr().err.split(" INFO Saving to ")[1]
    assert line in end.split(" INFO Done: ")[1] and "WARNING" not in end


def test_a_run_that_cannot_learn_is_told_at_its_start_and_end(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """--keep_samples 0 writes no samples, but the run compares some."""
    _, learnt = train(tmp_path, "--use_lora", "--learning_rate", 1e-7, "--num_train_epochs", 6, "--keep_samples", 0)
    assert (learnt["samples"], learnt["reproduced"]) == (4, 0)
    start, end = capfd.readouterr().err.split(" INFO step 1/6: ")
    assert "WARNING The run has only 6 optimizer steps, of 8 samples each, which teach little." in start
    assert "WARNING Nothing was learnt: the loss is " in end


def losses(start: float, end: float, noise: float, count: int, fall: int) -> list[float]:
    """Make a curve that falls over its first ``fall`` values."""
    draw = random.Random(0)
    return [start + (end - start) * min(step / fall, 1) + draw.gauss(0, noise) for step in range(count)]


@pytest.mark.parametrize("curve", [
    losses(4, 1, 0.3, 12, 12), losses(4, 2, 0.05, 100, 4), losses(2.0, 1.8, 0.4, 600, 600), [3.0, 3.0],
])  # fmt: skip
def test_a_loss_that_falls_is_no_alarm(curve: list[float]) -> None:
    assert find_no_fall(curve) is None


@pytest.mark.parametrize("curve", [losses(2, 2, 0.3, 60, 1), losses(2, 2.5, 0.1, 30, 30), [2.0] * 9])
def test_a_loss_that_stays_is_noticed(curve: list[float]) -> None:
    assert "a difference of less than 1 % or within its noise" in str(find_no_fall(curve))


# -------------------------------------------------------------------------------------------- without a run of its own


@pytest.fixture
def adapted(tmp_path: Path) -> Any:
    """Load a model of 16 bits with an adapter whose change is about a fifth of a step."""
    torch.manual_seed(0)
    model = load_model(load_checkpoint(str(copy_in_bfloat16(tmp_path / "base"))), torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn", "w1"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = (torch.randn(parameter.shape) * 0.002).to(torch.bfloat16)
    return model


def test_the_change_is_compared_with_the_steps_of_16_bits(adapted: Any, caplog: pytest.LogCaptureFixture) -> None:
    figures = measure_change(adapted, torch.bfloat16)
    steps, applied, learnt = [], 0.0, 0.0
    for layer in (module for module in adapted.modules() if hasattr(module, "lora_A")):
        weight, change = layer.get_base_layer().weight.float(), layer.get_delta_weight("default").float()
        after = torch.nextafter(weight.abs().bfloat16(), torch.tensor(math.inf, dtype=torch.bfloat16)).float()
        steps += (change.abs() / (after - weight.abs())).flatten().tolist()
        applied += float((((weight + change).bfloat16().float() - weight) * change).sum())
        learnt += float((change**2).sum())
    assert figures is not None and figures["dtype"] == "bfloat16"
    assert figures["median_steps"] == pytest.approx(sorted(steps)[len(steps) // 2], rel=0.02)
    assert figures["kept_by_nearest"] == pytest.approx(applied / learnt, abs=0.02)
    assert figures["median_steps"] < 0.5
    with caplog.at_level(logging.WARNING):
        warn_of_little({"change": figures}, [], 1e-4)
        warn_of_little({"change": {**figures, "median_steps": 0.7}}, [], 1e-4)
    [message] = caplog.messages
    assert f"rounds to nearest keeps {figures['kept_by_nearest']:.0%} of it".replace("%", " %") in message


def test_results_of_32_bits_hold_any_change(adapted: Any) -> None:
    assert measure_change(adapted, torch.float32) is None


def test_measuring_changes_nothing_and_ends_in_time(adapted: Any) -> None:
    samples = [TrainingSample("a", [5, 6, 7], [-100, 6, 7])] * 3
    before, state = {name: value.clone() for name, value in adapted.state_dict().items()}, torch.get_rng_state()
    adapted.train()
    figures = measure_samples(adapted, samples, seconds=0)
    measure_change(adapted, torch.bfloat16)
    assert (figures["samples"], figures["targets"]) == (1, 2)
    assert adapted.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())


def test_what_was_not_measured_is_said() -> None:
    assert describe_learnt({"skipped": "reason"}) == ["not compared with training samples: reason"]
    assert describe_learnt({}) == []
