"""The trainer of a run with everything it works on, built from the arguments."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import TrainingArguments

from data_utils.examples import ExampleSet
from loading.checkpoint import Checkpoint
from training.callbacks import RunLog, build_callbacks, set_tensorboard_folder
from training.config.args import RunArguments
from training.data import build_collator, build_train_dataset
from training.distributed.heartbeat import Heartbeat, HeartbeatCallback
from training.distributed.world import World
from training.held_out import HeldOut, SampleFile, source_names
from training.progress import Progress
from training.rows import why_apart
from training.run_folder.start import Start
from training.signals import Signals
from training.trainer import QwenTrainer

logger = logging.getLogger(__name__)


def build_trainer(
    args: RunArguments,
    training_arguments: TrainingArguments,
    checkpoint: Checkpoint,
    model: nn.Module,
    sets: Mapping[str, ExampleSet],
    facts: Mapping[str, Any],
    start: Start,
    world: World,
    heartbeat: Heartbeat,
    held_out: HeldOut | None = None,
) -> tuple[QwenTrainer, RunLog]:
    """Return the trainer and its log.

    Args:
        sets: the ``train`` examples, and ``eval`` examples if there are any.
        facts: what checkpoints record of the run, see ``training.run_folder.changes``.
        start: whether the run resumes.
        heartbeat: shows this rank's progress to the other ranks.
        held_out: the questions of ``--eval_generate``.
    """
    # Ranks that have not read the data have no reports.
    eval_sources = world.broadcast_from_rank0("sources", source_names(sets.get("eval")))
    samples = SampleFile(args.output_dir)
    log = RunLog(args.output_dir, Progress(), resumes=start.checkpoint is not None)
    collator = build_collator(args, checkpoint)
    trainer = QwenTrainer(
        checkpoint,
        loss=args.model.loss,
        data_mixing=args.data.data_mixing,
        finds_batch_size=args.trainer_value("auto_find_batch_size"),
        facts=facts,
        progress=log.progress,
        signals=Signals(),
        status=heartbeat.status,
        world=world,
        rate_ratio=args.lora.loraplus_lr_ratio,
        joins_rows=not collator.is_padded and _joins_rows(args),
        eval_sources=eval_sources,
        held_out=None if held_out is None else (held_out, samples),
        model=model,
        args=training_arguments,
        data_collator=collator,
        train_dataset=build_train_dataset(args, checkpoint, sets["train"]),
        eval_dataset=sets.get("eval"),
        callbacks=[*build_callbacks(args, log), HeartbeatCallback(heartbeat.status), *([samples] if held_out else [])],
    )
    set_tensorboard_folder(trainer.callback_handler.callbacks, args.options.logging_dir)
    return trainer, log


def _joins_rows(args: RunArguments) -> bool:
    """Return whether the rows of a step are joined; log what prevents it, unless the user does."""
    reason = why_apart(args)
    if reason and args.options.join_micro_batches and args.trainer_value("gradient_accumulation_steps") > 1:
        logger.info("Micro-batches are not joined: %s", reason)
    return not reason
