"""What is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import IntervalStrategy

from errors import ConfigError
from training.args import RunArguments


def check_args(args: RunArguments) -> None:
    """Check the arguments against each other and against the disk; nothing is changed.

    Raises:
        ConfigError: the first fault.
    """
    training, lora = args.training, args.lora
    if args.data.data_path is None:
        raise ConfigError("--data_path is missing", "Give a .json or .jsonl file of conversations")
    for flag, path in (("--data_path", args.data.data_path), ("--eval_data_path", args.data.eval_data_path)):
        if path is not None and not Path(path).is_file():
            what = "is a folder" if Path(path).is_dir() else "there is no such file"
            raise ConfigError(f"{flag} {path}: {what}", "Give a .json or .jsonl file of conversations")
    if lora.q_lora:
        raise ConfigError("--q_lora is not available yet", "Use --use_lora, with --bf16 on a GPU")
    if training.label_smoothing_factor:
        raise ConfigError(
            f"--label_smoothing_factor {training.label_smoothing_factor} is not available yet", "Leave it out"
        )
    if training.fp16 and not torch.cuda.is_available():
        raise ConfigError("--fp16 needs a GPU, and there is none", "Leave it out, or use --bf16")
    if training.model_max_length < 1:
        raise ConfigError(f"--model_max_length {training.model_max_length} is no length", "Give a number of tokens")
    if training.eval_strategy != "no" and args.data.eval_data_path is None:
        raise ConfigError(
            f"--eval_strategy {IntervalStrategy(training.eval_strategy).value} has nothing to evaluate on",
            "Give --eval_data_path too",
        )
    if not lora.use_lora:
        if lora.lora_weight_path:
            raise ConfigError(f"--lora_weight_path {lora.lora_weight_path} needs --use_lora", "Add --use_lora")
        if lora.trainable_embeddings not in ("auto", "full"):
            raise ConfigError(
                f"--trainable_embeddings {lora.trainable_embeddings} needs --use_lora: without it all parameters train",
                "Add --use_lora, or leave it out",
            )
    if training.n_gpu > 1:
        raise ConfigError(
            f"{training.n_gpu} GPUs are visible to one process",
            f"Set CUDA_VISIBLE_DEVICES=0, or launch with torchrun --nproc_per_node {training.n_gpu} finetune.py ...",
        )
    _check_output(args)


def _check_output(args: RunArguments) -> None:
    output = args.output_dir
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output_dir {output} is a file", "Give a folder")
    model = Path(args.model.model_name_or_path)
    if model.is_dir() and output.exists() and output.samefile(model):
        raise ConfigError(f"--output_dir {output} is the model's own folder", "Give another folder")
    if output.is_dir() and any(output.iterdir()) and not args.training.resume_from_checkpoint:
        raise ConfigError(
            f"--output_dir {output} is not empty",
            "Give a new folder, or --resume_from_checkpoint with one of its checkpoints",
        )
