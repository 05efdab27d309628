"""transformers' ``TrainingArguments`` of a run, built from its flags. Imports torch and transformers."""

from __future__ import annotations

import dataclasses
import logging
import os
from dataclasses import fields
from typing import Any

import torch
from transformers import TrainingArguments

from errors import ConfigError, one_line
from processes import without_launcher
from training.config.args import RunArguments
from training.config.defaults import training_defaults
from training.config.intervals import LOGGING_STEPS, evaluation_steps
from training.config.support import NO_EFFECT, OURS
from training.display import draws_bars

logger = logging.getLogger(__name__)


def remove_accelerate_variables() -> None:
    """Delete the environment variables from which accelerate would read precision, device and more."""
    for name in sorted(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_")):
            logger.warning("The environment variable %s is ignored: all settings of a run are flags", name)
            del os.environ[name]


def build_training_arguments(args: RunArguments) -> TrainingArguments:
    """Return the arguments of transformers' Trainer: its own flags only, and nothing from the environment.

    The process group must exist (``init_process_group``), and the result must exist before the model is loaded, because
    transformers keeps the DeepSpeed config in it.

    Raises:
        ConfigError: values that transformers refuses, or several GPUs visible to one process.
    """
    values = {**training_defaults(args.lora.use_lora), **args.trainer}
    values = {name: value for name, value in values.items() if name not in (*NO_EFFECT, *OURS)}
    if values.get("logging_steps") is None:
        values["logging_steps"] = LOGGING_STEPS
    values["eval_steps"] = evaluation_steps(values.get("eval_steps"), args.trainer_value("logging_steps"))
    values["disable_tqdm"] = not draws_bars(values.get("disable_tqdm"))
    names = {item.name for item in fields(TrainingArguments)}
    for name in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        new = name.replace("gradient", "activation")
        if name in values and new in names:
            values[new] = values.pop(name)
    if not values.get("fsdp"):
        values.pop("fsdp", None)
    # Without a GPU everything runs on the CPU anyway, but transformers allows bfloat16 there only with this flag.
    values["use_cpu"] = values.get("use_cpu", False) or not torch.accelerator.is_available()
    training_arguments = _build(values)
    if training_arguments.n_gpu > 1:
        raise ConfigError(
            f"{training_arguments.n_gpu} GPUs are visible to one process",
            "Set CUDA_VISIBLE_DEVICES=0, or launch with "
            f"torchrun --nproc_per_node {training_arguments.n_gpu} finetune.py ...",
        )
    return training_arguments


def check_training_arguments(args: RunArguments) -> None:
    """Find the values that only transformers refuses, for a command that does not train. Starts no processes.

    Raises:
        ConfigError: values that transformers refuses.
    """
    engine = {"deepspeed": None, "fsdp": False, "fsdp_config": None}  # checked by ``training.engine_checks``
    with without_launcher():
        build_training_arguments(dataclasses.replace(args, trainer={**args.trainer, **engine}))


def _build(values: dict[str, Any]) -> TrainingArguments:
    """Build transformers' arguments.

    Raises:
        ConfigError: values that it refuses.
    """
    try:
        return TrainingArguments(**values)
    except ConfigError:
        raise
    except (ValueError, TypeError, KeyError, NotImplementedError, ImportError, OSError) as error:
        raise ConfigError(f"command line: transformers refuses the arguments ({one_line(error)})") from error
