"""What the start-up block says about memory: nothing, a rehearsed figure, or the command that gives one."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from errors import ConfigError
from planning import at_start, command, expectation
from planning.devices import DEVICES
from planning.expectation import Machine
from tests.models import TINY
from tests.unit.planning.test_advice import rehearse
from training.config.args import RunArguments
from training.config.parsing import parse_args

MIB = 1 / 1024


def arguments() -> RunArguments:
    return parse_args(["--model_name_or_path", str(TINY), "--use_lora", "--bf16", "--plan"])


def trainer(blocks: int = 2, is_first: bool = True) -> Any:
    """A trainer whose model has 1 MiB of weights and whose examples have 3 and 4 tokens."""
    examples: Any = [{"input_ids": [0] * length, "labels": [1] * length} for length in (3, 4)]
    items = type("Items", (list,), {"lengths": [3, 4]})(examples)
    config = SimpleNamespace(num_hidden_layers=blocks, hidden_size=32, to_dict=lambda: {"model_type": "qwen"})
    return SimpleNamespace(
        is_world_process_zero=lambda: is_first, model=torch.nn.Linear(512, 512, bias=False),
        checkpoint=SimpleNamespace(config=config), train_dataset=items,
    )  # fmt: skip


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the machine have this many GiB, and a formula in place of the rehearsal."""

    def let(gib: float) -> None:
        monkeypatch.setattr(command, "this_machine", lambda args: Machine(DEVICES["A100"], gib))
        monkeypatch.setattr(expectation, "rehearse", rehearse)

    return let


def test_a_small_model_is_not_rehearsed(memory: Any) -> None:
    memory(65 * MIB)
    assert at_start.expected_memory(trainer(), arguments()) == ""


def test_a_model_that_takes_a_part_of_the_memory_is_rehearsed_with_its_longest_batch(memory: Any) -> None:
    memory(63 * MIB)
    words = at_start.expected_memory(trainer(), arguments())
    assert words == f"14.00 GiB expected for 7 tokens, in {63 * MIB:g} GiB: does not fit"  # 8 + 4 x 1 + 2 x 1


def test_a_deep_model_names_the_command_with_the_flags_of_the_run(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory(63 * MIB)
    monkeypatch.setattr("sys.argv", ["finetune.py", "--data_path", "my data.json"])
    words = at_start.expected_memory(trainer(blocks=40), arguments())
    assert "-m scripts.plan --data_path 'my data.json'" in words


def test_only_the_first_rank_says_it(memory: Any) -> None:
    memory(63 * MIB)
    assert at_start.expected_memory(trainer(is_first=False), arguments()) == ""


def test_a_rehearsal_that_fails_is_a_warning(
    memory: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConfigError("--optim odd cannot be rehearsed")

    memory(63 * MIB)
    monkeypatch.setattr(expectation, "rehearse", fail)
    with caplog.at_level(logging.WARNING):
        assert at_start.expected_memory(trainer(), arguments()) == ""
    assert "Without the expected memory, which failed" in caplog.text


def test_a_run_without_a_gpu_is_expected_on_its_host(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in ("planning.command", "training.planned_device"):
        monkeypatch.setattr(f"{module}.has_gpu", lambda: False)
    monkeypatch.setattr("planning.devices._present_device", lambda: None)
    with caplog.at_level("INFO"):
        assert command.this_machine(replace(arguments(), plan=False)).device.kind == "cpu" and not caplog.messages
        assert command.this_machine(arguments()).device.name == "A100"
    assert caplog.messages == ["No GPU here: planned for an A100. --use_cpu plans for this machine"]
