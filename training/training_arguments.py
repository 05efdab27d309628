"""transformers' TrainingArguments with ours beside them: what the Trainer is given. Imports torch and transformers."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from transformers import TrainingArguments

from errors import ConfigError, one_line
from training.config.args import TrainingOptions
from training.distributed.launch import init_process_group

logger = logging.getLogger(__name__)


@dataclass
class FinetuneArguments(TrainingArguments, TrainingOptions):
    """transformers' TrainingArguments with the original's additions."""

    def __post_init__(self) -> None:
        # Without a GPU everything runs on the CPU anyway; transformers wants to be told before it allows bfloat16.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()


def build_training_arguments(given: dict[str, Any], options: TrainingOptions) -> FinetuneArguments:
    """The arguments of the Trainer, from the flags that were given and from nothing else.

    Raises:
        ConfigError: values that transformers refuses.
    """
    _forget_environment()
    names = {item.name for item in fields(FinetuneArguments)}
    values = dict(given)
    for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        new = old.replace("gradient", "activation")
        if old in values and new in names:
            values[new] = values.pop(old)
    if not values.get("fsdp"):
        values.pop("fsdp", None)
    init_process_group(values.get("ddp_timeout", 1800), bool(values.get("deepspeed")), values.get("use_cpu", False))
    try:
        return FinetuneArguments(**values, **asdict(options))
    except ConfigError:
        raise
    except (ValueError, ImportError, OSError) as error:
        # What transformers finds wrong, without its traceback.
        raise ConfigError(f"command line: {one_line(error)}") from error


def _forget_environment() -> None:
    """accelerate would take precision, device and more from its variables."""
    for name in sorted(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_")):
            logger.warning("The environment variable %s is ignored: a run is what its arguments say", name)
            del os.environ[name]
