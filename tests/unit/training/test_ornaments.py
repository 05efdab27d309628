"""What a run can do without never costs its result."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

import finetune
from tests.commands import names_in, run_here
from tests.models import TINY, write_conversations
from training.callbacks import build_callbacks
from training.ornaments import Ornaments, ornament

EVENTS = ["on_train_begin", "on_step_begin", "on_log", "on_save", "on_train_end"]


def tracker(**methods: Any) -> TrainerCallback:
    """Return a callback like those of --report_to."""
    methods["__module__"] = "transformers.integrations.integration_utils"
    callback: TrainerCallback = type("Tracker", (TrainerCallback,), methods)()
    return callback


def test_an_ornament_that_fails_warns(caplog: pytest.LogCaptureFixture) -> None:
    with ornament("the loss curve"):
        raise ValueError("no such\nbackend")
    assert caplog.messages == ["Without the loss curve, which failed: ValueError: no such backend"]
    with pytest.raises(KeyboardInterrupt), ornament("the loss curve"):
        raise KeyboardInterrupt


@pytest.mark.parametrize("event", EVENTS)
def test_a_tracker_that_fails_warns_once_and_gets_no_more_events(event: str, caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def fail(self: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(event)
        raise ConnectionError("no network")

    callback: Any = tracker(**{event: fail})
    ornaments = Ornaments([callback])
    for _ in range(3):
        for name in EVENTS:
            getattr(callback, name)(None, None, None)
    ornaments.end()
    assert calls == [event]
    assert caplog.messages == ["Without Tracker, which failed: ConnectionError: no network"]


def test_other_callbacks_may_end_a_run() -> None:
    class Essential(TrainerCallback):
        def on_log(self, *args: Any, **kwargs: Any) -> None:
            raise ValueError("no log")

    callback = Essential()
    Ornaments([callback])
    with pytest.raises(ValueError, match="no log"):
        callback.on_log()


@pytest.mark.parametrize("flags", [[], ["--use_lora"]])
def test_the_result_is_saved_before_the_curve_is_drawn_and_trackers_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, flags: list[str]
) -> None:
    output, seen = tmp_path / "out", []

    def fail(*args: Any, **kwargs: Any) -> None:
        seen.append(set(names_in(output)))
        raise ValueError("Key backend: 'nonsense' is not a valid value for backend")

    def build(args: Any, log: Any) -> list[TrainerCallback]:
        return [*build_callbacks(args, log), tracker(on_train_end=fail)]

    monkeypatch.setattr("training.build.build_callbacks", build)
    monkeypatch.setattr("training.summary.plot_losses", fail)
    words = [
        "--model_name_or_path", TINY, "--data_path", write_conversations(tmp_path / "train.json"), "--output_dir",
        output, "--max_steps", 1, "--save_strategy", "no", "--use_cpu", "True", *flags,
    ]  # fmt: skip
    with caplog.at_level(logging.WARNING):
        assert run_here(finetune.main, "finetune.py", words) == 0
    weights = "adapter_model.safetensors" if flags else "model.safetensors"
    assert len(seen) == 2
    assert all({weights, "tokenizer_config.json", "run_summary.json"} <= names for names in seen)
    assert "training_loss.png" not in names_in(output)
