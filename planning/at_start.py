"""What the start-up block of a run says about memory: a rehearsal if it is quick, else the command that does one."""

from __future__ import annotations

import shlex
import sys
from typing import Any

from console import python_command
from planning.batches import RunBatches
from planning.devices import GIB
from planning.expectation import Planner
from planning.report import gib
from processes import count_processes
from training.config.args import RunArguments
from training.ornaments import ornament
from training.rows import why_padded

_QUICK_SECONDS = 3.0
_SECONDS, _SECONDS_PER_BLOCK = 1.0, 0.2  # measured on one core
_MATTERS = 1 / 64
"""Part of a device's memory; a model that takes less of it always fits."""


def expected_memory(trainer: Any, args: RunArguments) -> str:
    """Return the start-up block's words about memory, on rank 0; empty for a small model. Never fails a run."""
    if not trainer.is_world_process_zero():
        return ""
    with ornament("the expected memory"):
        return _expected(trainer, args)
    return ""


def _expected(trainer: Any, args: RunArguments) -> str:
    from planning.command import this_machine

    machine = this_machine(args)
    held = sum(parameter.numel() * parameter.element_size() for parameter in trainer.model.parameters())
    if held < machine.memory_gib * GIB * _MATTERS:
        return ""
    config = trainer.checkpoint.config
    if _SECONDS + _SECONDS_PER_BLOCK * config.num_hidden_layers > _QUICK_SECONDS:
        return f"{_plan_command()} says what a step takes"
    batches = RunBatches(trainer.train_dataset, bool(why_padded(args, config.to_dict())))
    expected = Planner(machine, config.hidden_size, batches).expect(args)
    tokens, verdict = sum(expected.shape.lengths), "fits" if expected.fits else "does not fit"
    return f"{gib(expected.share.peak_bytes)} expected for {tokens:,} tokens, in {machine.memory_gib:g} GiB: {verdict}"


def _plan_command() -> str:
    gpus = f"--gpus {count_processes()}" if count_processes() > 1 else ""
    return python_command("-m scripts.plan", *map(shlex.quote, sys.argv[1:]), *gpus.split())
