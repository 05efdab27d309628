"""The plan of a run, as ``finetune.py --plan`` and ``scripts.plan`` print it."""

from __future__ import annotations

import logging
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from checkpoints.files import save_json
from console import show
from loading.adapters import embeddings_policy
from planning.advice import advise
from planning.batches import RunBatches
from planning.devices import find_device
from planning.expectation import Expectation, Machine, Planner
from planning.model import read_checkpoint
from planning.report import gib, render, to_json
from planning.shallow import find_blocks
from processes import count_processes, has_gpu, is_first
from training.config.args import RunArguments
from training.planned_device import lacks_gpu
from training.training_arguments import check_training_arguments

logger = logging.getLogger(__name__)


def show_plan(args: RunArguments, machine: Machine | None = None, file: Path | None = None) -> int:
    """Print the plan of a run, and return 0 if it fits, else 1.

    Args:
        machine: by default this one, with as many devices as there are processes.
        file: to write everything to, as JSON.

    Raises:
        ConfigError: arguments, a checkpoint or an engine that cannot be rehearsed.
        DataError: data that cannot be used.
    """
    if not is_first():
        return 0
    no_gpu_needed = {name: value for name, value in args.trainer.items() if name != "tf32"}
    check_training_arguments(replace(args, trainer=no_gpu_needed))
    machine = machine or this_machine(args)
    checkpoint = read_checkpoint(args)
    batches = RunBatches.of_run(args, machine.processes) if args.data.data_path else None
    config = checkpoint.config
    planner = Planner(machine, int(config.hidden_size), batches, find_blocks(config))
    logger.info("Rehearsing a step of one process, without data")
    run = planner.expect(args)
    logger.info("As it is: %s, after %.1f s", gib(run.share.peak_bytes), run.rehearsal.seconds_taken)
    advice = None if run.fits else advise(planner, run)
    title = _title(args, checkpoint, run)
    for line in render(run, title, advice):
        show(line)
    if file is not None:
        save_json(to_json(run, title, advice, shlex.join(sys.argv)), file)
    return 0 if run.fits else 1


def this_machine(args: RunArguments) -> Machine:
    """Return this machine: its GPU, or its CPU for a run without one. A plan without one is for the table's default."""
    device = find_device(None, lacks_gpu(args))
    if device.kind == "cuda" and not has_gpu():
        logger.info("No GPU here: planned for an %s. --use_cpu plans for this machine", device.name)
    return Machine(device, round(device.memory_gib, 1), count_processes())


def _title(args: RunArguments, checkpoint: Any, run: Expectation) -> str:
    lora = args.lora
    mode = "all parameters"
    if lora.use_lora:
        mode = f"LoRA of rank {lora.lora_r}"
        if quantization := checkpoint.quantization or lora.quantization:
            mode = f"Q-LoRA of rank {lora.lora_r} ({quantization})"
        policy = embeddings_policy(lora.trainable_embeddings, checkpoint, lora.lora_weight_path)
        mode += f", trained embeddings: {policy.mode}"
        logger.info("Trained embeddings: %s (%s)", policy.mode, policy.reason)
    return f"{args.model.model_name_or_path} ({checkpoint.model_type}), {mode}, {args.precision}"
