"""What lets several processes train one model: DDP, DeepSpeed's ZeRO, FSDP2; and what each of them cannot do.

No torch here: a config that cannot work is refused before anything is loaded.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errors import ConfigError
from loading.config_files import find_local_folder, load_model_config

if TYPE_CHECKING:
    from training.config.args import RunArguments
from processes import count_processes, has_gpu

# DeepSpeed's schedules, by the name that transformers has for the same.
_SCHEDULES = {"WarmupLR": "constant_with_warmup", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
_NEEDED = "pip install -r requirements_distributed.txt -c constraints.txt, or start it with torchrun and without it"


@dataclass(frozen=True)
class Engine:
    """How the processes of a run share its model.

    Attributes:
        name: ``none`` (one process), ``ddp``, ``zero0`` to ``zero3``, ``fsdp2``.
        config: DeepSpeed's or FSDP's, as it was given.
    """

    name: str
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def is_deepspeed(self) -> bool:
        return self.name.startswith("zero")

    @property
    def shards_parameters(self) -> bool:
        """Whether a process holds only its share of every parameter."""
        return self.name in ("zero3", "fsdp2")

    @property
    def title(self) -> str:
        """As people call it."""
        names = {"none": "one process", "ddp": "DDP", "fsdp2": "FSDP2"}
        title = names.get(self.name) or f"DeepSpeed ZeRO-{self.name[-1]}"
        zero = self.config.get("zero_optimization", {})
        offloaded = [part for part in ("optimizer", "param") if _device(zero.get(f"offload_{part}")) != "none"]
        return f"{title} with offloading" if offloaded or self.config.get("cpu_offload") else title


def find_engine(args: RunArguments) -> Engine:
    """The engine that the arguments ask for, and else DDP where there are several processes.

    Raises:
        ConfigError: a config that cannot be read, or names no stage or version that there is.
    """
    deepspeed, fsdp = args.trainer_value("deepspeed"), args.trainer_value("fsdp")
    if _is_given(deepspeed):
        config = _load_config("--deepspeed", deepspeed)
        zero = config.get("zero_optimization", {})
        stage = zero.get("stage", 0) if isinstance(zero, dict) else None
        if stage not in (0, 1, 2, 3):
            raise ConfigError(
                f"--deepspeed {_shown(deepspeed)}: zero_optimization.stage is {stage!r}", "Give 1, 2 or 3"
            )
        return Engine(f"zero{stage}", config)
    if _is_given(fsdp):
        given = args.trainer_value("fsdp_config")
        config = {} if given is None else _load_config("--fsdp_config", given)
        config = {name.removeprefix("fsdp_"): value for name, value in config.items()}
        if str(config.get("version", 2)) != "2":
            raise ConfigError(
                f"--fsdp_config {_shown(given)}: version {config['version']} is not supported", 'Give "version": 2'
            )
        return Engine("fsdp2", config)
    return Engine("ddp" if count_processes() > 1 else "none")


def check_engine(args: RunArguments) -> Iterator[ConfigError]:
    """What the engine cannot do, and where its config says other than the arguments."""
    try:
        engine = find_engine(args)
    except ConfigError as error:
        yield error
        return
    if _is_given(args.trainer_value("deepspeed")) and _is_given(args.trainer_value("fsdp")):
        yield ConfigError("--deepspeed and --fsdp are two engines", "Give one of them")
    if args.trainer_value("fsdp_config") is not None and engine.name != "fsdp2":
        yield ConfigError("--fsdp_config needs --fsdp", "Add it, or leave both out")
    if engine.is_deepspeed:
        yield from _check_deepspeed(args, engine)
    elif engine.name == "fsdp2":
        yield from _check_fsdp(args, engine)
    if engine.shards_parameters:
        yield from _check_sharded(args, engine)


def _check_deepspeed(args: RunArguments, engine: Engine) -> Iterator[ConfigError]:
    where = f"--deepspeed {_shown(args.trainer_value('deepspeed'))}"
    if importlib.util.find_spec("deepspeed") is None:
        yield ConfigError(f"{where}: DeepSpeed is not installed", _NEEDED)
    for key, value, flag, wanted in _said_twice(args, engine.config):
        yield ConfigError(f"{where}: {key} is {value}, {flag} is {wanted}", f'Give "auto" for {key}, or change {flag}')
    schedule = engine.config.get("scheduler", {}).get("type")
    asked = args.trainer_value("lr_scheduler_type")
    if schedule is not None and _SCHEDULES.get(schedule) != asked:
        yield ConfigError(
            f"{where}: scheduler.type is {schedule}, --lr_scheduler_type is {asked}",
            "Remove scheduler from the file: --lr_scheduler_type and --warmup_steps do the same",
        )
    if args.options.pure_bf16:
        yield ConfigError("--pure_bf16 and --deepspeed are two precisions", "Give --bf16 instead of --pure_bf16")


def _said_twice(args: RunArguments, config: dict[str, Any]) -> Iterator[tuple[str, Any, str, Any]]:
    """Keys of DeepSpeed's config whose value is not the one of the flag that says the same."""
    get = args.trainer_value
    batch, accumulation = get("per_device_train_batch_size"), get("gradient_accumulation_steps")
    whole = batch * accumulation * count_processes()
    product = f"--per_device_train_batch_size x --gradient_accumulation_steps x {count_processes()} processes"
    for key, flag, value in (
        ("train_micro_batch_size_per_gpu", "--per_device_train_batch_size", batch),
        ("gradient_accumulation_steps", "--gradient_accumulation_steps", accumulation),
        ("train_batch_size", product, whole),
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
        yield ConfigError("--fsdp shards a model over several processes, and there is one", "Start it with torchrun")
    if engine.config.get("cpu_offload") and (args.trainer_value("use_cpu") or not has_gpu()):
        yield ConfigError("--fsdp_config: cpu_offload needs GPUs, and there are none", "Leave it out")
    if args.trainer_value("fp16"):
        yield ConfigError("--fsdp and --fp16 do not go together", "Give --bf16, or use DeepSpeed")
    folder = find_local_folder(args.model.model_name_or_path, args.options.cache_dir, args.model.model_hub)
    if args.lora.trainable_embeddings == "chatml_tokens" and load_model_config(folder).get("tie_word_embeddings"):
        yield ConfigError(
            "--trainable_embeddings chatml_tokens: FSDP cannot shard trained rows that embedding and head share",
            "Give --trainable_embeddings full, or use DeepSpeed",
        )
    if engine.config.get("activation_checkpointing") and args.trainer_value("gradient_checkpointing"):
        yield ConfigError(
            "--fsdp_config: activation_checkpointing and --gradient_checkpointing do the same", "Give one of them"
        )


def _check_sharded(args: RunArguments, engine: Engine) -> Iterator[ConfigError]:
    if args.lora.q_lora:
        yield ConfigError(
            f"--q_lora: quantised weights cannot be sharded by {engine.title}",
            "Leave the engine out (each process then holds them whole, which Q-LoRA makes small), or use ZeRO-2",
        )


def _load_config(flag: str, value: Any) -> dict[str, Any]:
    """A config that was given as a file, as JSON, or as an object in a file of flags."""
    if isinstance(value, dict):
        return value
    where = f"{flag} {value}"
    try:
        config = json.loads(value if value.lstrip().startswith("{") else Path(value).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{where}: it cannot be read ({error.strerror})", "finetune/ has some to start from"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{where}: it is not JSON ({error})", "Correct it, or take one of finetune/") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{where}: it is no JSON object", "Take one of finetune/")
    return config


def _is_given(value: Any) -> bool:
    return value not in (None, "", False, "False", "false", [])


def _device(offload: Any) -> str:
    return str(offload.get("device", "none")) if isinstance(offload, dict) else "none"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
