"""Checks of the engine: what it cannot do, and where its config contradicts the arguments."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

from console import pip_command
from errors import ConfigError
from loading.config_files import find_local_folder, load_model_config
from processes import count_processes
from training.config.args import RunArguments
from training.config.engines import Engine, find_engine, is_set, show_config
from training.planned_device import lacks_gpu

# DeepSpeed's schedules: the transformers name of the same schedule.
_SCHEDULES = {"WarmupLR": "constant_with_warmup", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}


def check_engine(args: RunArguments) -> Iterator[ConfigError]:
    """Yield every conflict between the engine, its config and the other arguments."""
    try:
        engine = find_engine(args.trainer)
    except ConfigError as error:
        yield error
        return
    if is_set(args.trainer_value("deepspeed")) and is_set(args.trainer_value("fsdp")):
        yield ConfigError("--deepspeed and --fsdp are two engines", "Give one of them")
    if args.trainer_value("fsdp_config") is not None and engine.name != "fsdp2":
        yield ConfigError("--fsdp_config needs --fsdp", "Add --fsdp, or remove --fsdp_config")
    if engine.is_deepspeed:
        yield from _check_deepspeed(args, engine)
    elif engine.name == "fsdp2":
        yield from _check_fsdp(args, engine)
    if engine.shards_parameters and args.options.eval_generate is not None:
        what = f"--eval_generate {args.options.eval_generate}: each process has only a part of the weights with "
        yield ConfigError(f"{what}{engine.title}", "Remove it, or use ZeRO-2")
    if engine.shards_parameters and args.lora.q_lora:
        yield ConfigError(
            f"--q_lora: quantised weights cannot be sharded by {engine.title}",
            "Remove the engine (each process then holds all weights, which are small when quantised), or use ZeRO-2",
        )


def _check_deepspeed(args: RunArguments, engine: Engine) -> Iterator[ConfigError]:
    where = f"--deepspeed {show_config(args.trainer_value('deepspeed'))}"
    if importlib.util.find_spec("deepspeed") is None and not args.plan:
        install = pip_command("requirements_distributed.txt")
        yield ConfigError(f"{where}: DeepSpeed is not installed", f"{install}, or remove --deepspeed")
    for key, value, flag, wanted in _contradictions(args, engine.config):
        yield ConfigError(f"{where}: {key} is {value}, {flag} is {wanted}", f'Give "auto" for {key}, or change {flag}')
    schedule, wanted = engine.config.get("scheduler", {}).get("type"), args.trainer_value("lr_scheduler_type")
    if schedule is not None and _SCHEDULES.get(schedule) != wanted:
        yield ConfigError(
            f"{where}: scheduler.type is {schedule}, --lr_scheduler_type is {wanted}",
            "Remove scheduler from the file: --lr_scheduler_type and --warmup_steps do the same",
        )
    if args.options.pure_bf16:
        yield ConfigError("--deepspeed does not support --pure_bf16", "Give --bf16 instead of --pure_bf16")


def _contradictions(args: RunArguments, config: dict[str, Any]) -> Iterator[tuple[str, Any, str, Any]]:
    """Yield key and value in DeepSpeed's config, flag and value, for each key that its flag contradicts."""
    get = args.trainer_value
    batch, accumulation = get("per_device_train_batch_size"), get("gradient_accumulation_steps")
    total = batch * accumulation * count_processes()
    product = f"--per_device_train_batch_size x --gradient_accumulation_steps x {count_processes()} processes"
    for key, flag, value in (
        ("train_micro_batch_size_per_gpu", "--per_device_train_batch_size", batch),
        ("gradient_accumulation_steps", "--gradient_accumulation_steps", accumulation),
        ("train_batch_size", product, total),
        ("gradient_clipping", "--max_grad_norm", get("max_grad_norm")),
        ("bf16.enabled", "--bf16", get("bf16")),
        ("fp16.enabled", "--fp16", get("fp16")),
        ("optimizer.params.lr", "--learning_rate", get("learning_rate")),
        ("optimizer.params.betas", "--adam_beta1 and --adam_beta2", [get("adam_beta1"), get("adam_beta2")]),
        ("optimizer.params.eps", "--adam_epsilon", get("adam_epsilon")),
        ("optimizer.params.weight_decay", "--weight_decay", get("weight_decay")),
        ("scheduler.params.warmup_max_lr", "--learning_rate", get("learning_rate")),
    ):
        node: Any = config
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        if node is not None and node != "auto" and node != value:
            yield key, node, flag, value


def _check_fsdp(args: RunArguments, engine: Engine) -> Iterator[ConfigError]:
    if count_processes() == 1:
        yield ConfigError("--fsdp needs several processes to shard the model over", "Start it with torchrun")
    if engine.config.get("cpu_offload") and lacks_gpu(args):
        yield ConfigError("--fsdp_config: cpu_offload needs a GPU, and none is available", "Remove cpu_offload")
    if args.trainer_value("fp16"):
        yield ConfigError("--fsdp does not support --fp16", "Give --bf16, or use DeepSpeed")
    folder = find_local_folder(args.model.model_name_or_path, args.model.cache_dir, args.model.model_hub)
    if args.lora.trainable_embeddings == "chatml_tokens" and load_model_config(folder).get("tie_word_embeddings"):
        yield ConfigError(
            "--trainable_embeddings chatml_tokens: FSDP cannot shard trained rows of an embedding tied to the head",
            "Give --trainable_embeddings full, or use DeepSpeed",
        )
    if engine.config.get("activation_checkpointing") and args.trainer_value("gradient_checkpointing"):
        yield ConfigError(
            "--fsdp_config: activation_checkpointing and --gradient_checkpointing (on by default) do the same",
            "Remove activation_checkpointing from the file",
        )
