"""Corrections to how transformers' Trainer prepares models: options of DDP and FSDP, FSDP on CPUs, training mode."""

from __future__ import annotations

import sys
from typing import Any

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, other
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import Trainer, TrainingArguments


def complete_engine_options(args: TrainingArguments) -> None:
    """Set the options of DDP and FSDP that the Accelerator is created with."""
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False  # every batch uses every trained parameter
    if args.fsdp and args.bf16:
        # Gradients are summed in float32, and the loss is not rounded.
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        args.fsdp_plugin_args["mixed_precision_policy"] = policy
    config: Any = args.accelerator_config
    if args.fsdp and config.gradient_accumulation_kwargs is None:
        # Between micro-batches a rank keeps its shard of the gradients, not all of them.
        config.gradient_accumulation_kwargs = {"sync_each_batch": True}


def skip_unused_deepspeed() -> None:
    """Keep accelerate from importing DeepSpeed, for a second, only to compare its class with that of a model."""
    other.is_deepspeed_available = lambda: "deepspeed" in sys.modules


def enable_fsdp_on_cpu(trainer: Trainer) -> None:
    """Shard with FSDP on CPUs too, where accelerate silently falls back to DDP."""
    if trainer.args.fsdp and not trainer.is_fsdp_enabled:
        state = trainer.accelerator.state
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
        state.distributed_type = DistributedType.FSDP
        trainer.is_fsdp_enabled = True


def keep_training_mode(model: Any, inner: nn.Module) -> None:
    """Let ``model.train()`` return at once in training mode: transformers calls it before every micro-batch.

    torch would visit every module. Evaluations set the mode of the inner model alone, so both are asked.

    Args:
        model: as it is trained, possibly in a wrapper such as DDP.
        inner: without the wrapper.
    """
    if "train" in vars(model):
        return
    set_mode = model.train

    def train(mode: bool = True) -> Any:
        return model if mode and model.training and inner.training else set_mode(mode)

    model.train = train
    set_mode()  # a model that has been loaded is in evaluation mode below its wrappers
