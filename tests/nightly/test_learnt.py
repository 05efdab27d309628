"""What a run on the real model says at its end is true of the adapter that it saved."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoints.training_samples import TrainingSamples
from loading.checkpoint import load_checkpoint
from loading.inference import load_for_inference
from tests.commands import read_json
from training.learnt import measure_change, measure_samples


def test_figures_at_the_end_of_a_run_are_those_of_the_saved_adapter(small_model: Path, tuned: Path) -> None:
    """Training computes in float32, the reopened adapter in the base's bfloat16."""
    said = read_json(tuned / "run_summary.json")["learnt"]
    checkpoint = load_checkpoint(str(small_model))
    model = load_for_inference(checkpoint, str(tuned))
    found = measure_samples(model, TrainingSamples.read(tuned).samples, seconds=600)
    assert (found["samples"], found["targets"]) == (said["samples"], said["targets"])
    assert abs(found["correct"] - said["correct"]) <= 0.03 * found["targets"]
    assert found["loss"] == pytest.approx(said["loss"], rel=0.02)
    change = measure_change(model, checkpoint.dtype)
    assert change is not None and change.pop("dtype") == said["change"].pop("dtype") == "bfloat16"
    assert change == pytest.approx(said["change"], rel=0.01)
