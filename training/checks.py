"""What is refused before anything is loaded."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import IntervalStrategy
from transformers.integrations.integration_utils import get_available_reporting_integrations

from errors import ConfigError
from training.args import RunArguments


def check_args(args: RunArguments) -> None:
    """Check the arguments against each other and against the disk; nothing is changed.

    Raises:
        ConfigError: the first fault.
    """
    _check_data(args)
    _check_numbers(args)
    _check_lora(args)
    _check_machine(args)
    _check_output(args)


def _check_data(args: RunArguments) -> None:
    data, strategy = args.data, IntervalStrategy(args.training.eval_strategy)
    if data.data_path is None:
        raise ConfigError("--data_path is missing", "Give a .json or .jsonl file of conversations")
    for flag, path in (("--data_path", data.data_path), ("--eval_data_path", data.eval_data_path)):
        if path is not None and not Path(path).is_file():
            what = "is a folder" if Path(path).is_dir() else "there is no such file"
            raise ConfigError(f"{flag} {path}: {what}", "Give a .json or .jsonl file of conversations")
    if strategy != IntervalStrategy.NO and data.eval_data_path is None:
        raise ConfigError(f"--eval_strategy {strategy.value} has nothing to evaluate on", "Give --eval_data_path too")


def _check_numbers(args: RunArguments) -> None:
    training, lora = args.training, args.lora
    positive = {
        "--model_max_length": training.model_max_length,
        "--per_device_train_batch_size": training.per_device_train_batch_size,
        "--per_device_eval_batch_size": training.per_device_eval_batch_size,
        "--gradient_accumulation_steps": training.gradient_accumulation_steps,
        "--lora_r": lora.lora_r,
    }
    for flag, value in positive.items():
        if value < 1:
            raise ConfigError(f"{flag} {value} is not possible", "Give 1 or more")
    if training.num_train_epochs <= 0 and training.max_steps <= 0:
        raise ConfigError(f"--num_train_epochs {training.num_train_epochs} trains nothing", "Give more than 0")
    if not 0 <= lora.lora_dropout < 1:
        raise ConfigError(f"--lora_dropout {lora.lora_dropout} is not possible", "Give 0 or more and less than 1")
    if training.label_smoothing_factor:
        what = f"--label_smoothing_factor {training.label_smoothing_factor} is not available yet"
        raise ConfigError(what, "Leave it out")


def _check_lora(args: RunArguments) -> None:
    lora = args.lora
    if lora.q_lora:
        raise ConfigError("--q_lora is not available yet", "Use --use_lora, with --bf16 on a GPU")
    if lora.use_lora:
        return
    if lora.lora_weight_path:
        raise ConfigError(f"--lora_weight_path {lora.lora_weight_path} needs --use_lora", "Add --use_lora")
    if lora.trainable_embeddings not in ("auto", "full"):
        raise ConfigError(
            f"--trainable_embeddings {lora.trainable_embeddings} needs --use_lora: without it all parameters train",
            "Add --use_lora, or leave it out",
        )


def _check_machine(args: RunArguments) -> None:
    training = args.training
    if training.fp16 and not torch.cuda.is_available():
        raise ConfigError("--fp16 needs a GPU, and there is none", "Leave it out, or use --bf16")
    if missing := sorted(set(training.report_to or ()) - set(get_available_reporting_integrations())):
        raise ConfigError(
            f"--report_to {missing[0]}: it is not installed", f"pip install {missing[0]}, or leave it out"
        )
    if training.n_gpu > 1:
        raise ConfigError(
            f"{training.n_gpu} GPUs are visible to one process",
            f"Set CUDA_VISIBLE_DEVICES=0, or launch with torchrun --nproc_per_node {training.n_gpu} finetune.py ...",
        )


def _check_output(args: RunArguments) -> None:
    output = args.output_dir
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output_dir {output} is a file", "Give a folder")
    model = Path(args.model.model_name_or_path)
    if model.is_dir() and output.exists() and output.samefile(model):
        raise ConfigError(f"--output_dir {output} is the model's own folder", "Give another folder")
    parent = next(folder for folder in (output, *output.absolute().parents) if folder.is_dir())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"--output_dir {output}: {parent} is not writable", "Choose a folder you may write to")
    if args.resumed_checkpoint() is None and output.is_dir() and any(output.iterdir()):
        raise ConfigError(
            f"--output_dir {output} is not empty",
            "Give a new folder, or --resume_from_checkpoint with one of its checkpoints",
        )
