"""What is refused before anything is loaded: every conflict between arguments, and with the disk, at once."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

from checkpoints.model_config import check_bitsandbytes, find_quantization
from data_utils.sources import parse_fill, parse_source
from errors import ConfigError, numbered
from loading.config_files import find_local_folder, load_model_config, module_names, most_positions
from processes import has_gpu, is_first
from training.config.args import LoraArguments, RunArguments, parse_profile_steps
from training.config.flags import nearest
from training.engine_checks import check_engine
from training.run_folder.prepare import check_output
from training.run_folder.start import check_start

# Where what --report_to names is imported from.
REPORTERS = {
    "tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "swanlab": ("swanlab",),
    "mlflow": ("mlflow",), "comet_ml": ("comet_ml",), "clearml": ("clearml",), "codecarbon": ("codecarbon",),
    "dagshub": ("dagshub",), "dvclive": ("dvclive",), "neptune": ("neptune",), "trackio": ("trackio",),
    "azure_ml": ("azureml",), "kubeflow": ("kubeflow",), "flyte": ("flytekit",),
}  # fmt: skip

# Seconds. Python does not let another thread speak while a library is imported or a kernel compiled.
MIN_HEARTBEAT = 5

_EVALUATE = "Give --eval_strategy, and --eval_data_path or --eval_split"

Faults = Iterator[ConfigError]


def check_args(args: RunArguments) -> None:
    """Check the arguments against each other and against the disk; nothing is changed.

    Imports nothing heavy, but torch where ``--fp16`` asks what the machine can do.

    Raises:
        ConfigError: all faults; several are a numbered list.
    """
    checks: tuple[Callable[[RunArguments], Faults], ...] = (
        _check_data, _check_numbers, _check_precision, _check_lora, _check_quantization, _check_optimizer, _check_model,
        _check_schedule, _check_services, check_engine, _check_output,
    )  # fmt: skip
    faults = [fault for check in checks for fault in check(args)]
    if len(faults) == 1:
        raise faults[0]
    if faults:
        raise ConfigError(numbered(f"{len(faults)} faults in the arguments", faults))


def _evaluates(args: RunArguments) -> bool:
    return bool(args.trainer_value("eval_strategy") != "no")


def _check_data(args: RunArguments) -> Faults:
    data, get = args.data, args.trainer_value
    if not data.data_path:
        yield ConfigError("--data_path is missing", "Give a file of conversations or a folder of them")
    for flag, names in (("--data_path", data.data_path), ("--eval_data_path", data.eval_data_path)):
        for name in names or ():
            yield from _faults_of(parse_source, name, flag)
    yield from _faults_of(parse_fill, data.fill or ())
    if not 0 <= data.eval_split < 1:
        yield ConfigError(f"--eval_split {data.eval_split:g} is not possible", "Give a share between 0 and 1")
    if data.eval_split and data.eval_data_path:
        what = f"--eval_split {data.eval_split:g} and --eval_data_path both say what to evaluate on"
        yield ConfigError(what, "Give one of them")
    asking = f"--eval_strategy {get('eval_strategy')}" if _evaluates(args) else "--eval_on_start"
    if (_evaluates(args) or get("eval_on_start")) and not (data.eval_data_path or data.eval_split):
        yield ConfigError(f"{asking} has nothing to evaluate on", "Give --eval_data_path or --eval_split too")
    if data.data_mixing != "mixed" and get("train_sampling_strategy") != "random":
        strategy = f"--train_sampling_strategy {get('train_sampling_strategy')}"
        yield ConfigError(f"--data_mixing {data.data_mixing} and {strategy} are two orders", "Leave one of them out")


def _faults_of(check: Callable[..., object], *arguments: object) -> Faults:
    try:
        check(*arguments)
    except ConfigError as error:
        yield error


def _check_numbers(args: RunArguments) -> Faults:
    get = args.trainer_value
    counts = {
        "model_max_length": args.data.model_max_length,
        "per_device_train_batch_size": get("per_device_train_batch_size"),
        "per_device_eval_batch_size": get("per_device_eval_batch_size"),
        "gradient_accumulation_steps": get("gradient_accumulation_steps"),
        "lora_r": args.lora.lora_r,
        "save_total_limit": get("save_total_limit"),
        "early_stopping_patience": args.options.early_stopping_patience,
    }
    for name, value in counts.items():
        if value is not None and value < 1:
            yield ConfigError(f"--{name} {value} is not possible", "Give 1 or more")
    for name in ("learning_rate", "weight_decay", "warmup_steps", "max_grad_norm", "adam_epsilon"):
        if get(name) < 0:
            yield ConfigError(f"--{name} {get(name)} is not possible", "Give 0 or more")
    shares = {"lora_dropout": args.lora.lora_dropout, "adam_beta1": get("adam_beta1"), "adam_beta2": get("adam_beta2")}
    for name, value in shares.items():
        if not 0 <= value < 1:
            yield ConfigError(f"--{name} {value} is not possible", "Give 0 or more and less than 1")
    if (seconds := args.options.heartbeat_timeout) != 0 and seconds < MIN_HEARTBEAT:
        yield ConfigError(f"--heartbeat_timeout {seconds:g} is not possible", f"Give {MIN_HEARTBEAT} or more, or 0")
    if get("num_train_epochs") <= 0 and get("max_steps") <= 0:
        yield ConfigError(f"--num_train_epochs {get('num_train_epochs')} trains nothing", "Give more than 0")
    if get("label_smoothing_factor") and args.model.loss != "lean":
        what = f"--label_smoothing_factor {get('label_smoothing_factor')} needs --loss lean"
        yield ConfigError(what, "Leave one of them out")
    if get("dataloader_num_workers") == 0 and get("dataloader_prefetch_factor") is not None:
        yield ConfigError("--dataloader_prefetch_factor needs --dataloader_num_workers", "Give 1 or more workers")
    if args.options.profile_steps is not None:
        yield from _faults_of(parse_profile_steps, args.options.profile_steps)


def _check_precision(args: RunArguments) -> Faults:
    get, bf16 = args.trainer_value, "--pure_bf16" if args.options.pure_bf16 else "--bf16"
    if get("fp16") and (get("bf16") or args.options.pure_bf16):
        yield ConfigError(f"--fp16 and {bf16} are two precisions", "Give one of them")
    elif get("fp16") and (get("use_cpu") or not has_gpu()):
        yield ConfigError("--fp16 needs a GPU, and there is none", "Leave it out, or use --bf16")
    if get("fp16_full_eval") and get("bf16_full_eval"):
        yield ConfigError("--fp16_full_eval and --bf16_full_eval are two precisions", "Give one of them")


def _check_lora(args: RunArguments) -> Faults:
    lora = args.lora
    if lora.use_lora:
        yield from _check_continued_adapter(lora)
        return
    for item in fields(LoraArguments):
        value = getattr(lora, item.name)
        # Without LoRA embeddings always train, so "full" is what happens.
        if value != item.default and not (item.name == "trainable_embeddings" and value == "full"):
            shown = "" if value is True else " " + (" ".join(value) if isinstance(value, list) else str(value))
            yield ConfigError(
                f"--{item.name}{shown} needs --use_lora: without it all parameters train",
                "Add --use_lora, or leave it out",
            )


def _check_quantization(args: RunArguments) -> Faults:
    """What is asked for against what the checkpoint is; its config says whether its weights are quantised."""
    lora, folder = args.lora, _model_folder(args)
    try:
        saved = find_quantization(folder)
    except ConfigError as error:
        yield error
        return
    asked = [f"--quant_type {lora.quant_type}"] if lora.quant_type else []
    asked += ["--load_in_8bit"] if lora.load_in_8bit else []
    is_quantised = f"--model_name_or_path {args.model.model_name_or_path}: its weights are quantised ({saved})"
    if saved and not lora.use_lora:
        if not args.dry_run:  # a look at the data needs no word of how it will be trained
            what = f"{is_quantised} and cannot be trained themselves"
            yield ConfigError(what, "Add --use_lora --q_lora, or give the unquantised model")
    elif saved and not lora.q_lora:
        yield ConfigError(f"{is_quantised}: LoRA on them is Q-LoRA", "Add --q_lora, or give the unquantised model")
    elif saved and asked:
        yield ConfigError(f"{is_quantised} already: {' and '.join(asked)} cannot be had", f"Leave {asked[0]} out")
    if asked and lora.use_lora and not lora.q_lora:
        yield ConfigError(f"{' and '.join(asked)} needs --q_lora", "Add --q_lora, or leave it out")
    if len(asked) == 2:
        yield ConfigError(f"{' and '.join(asked)} are two ways to quantise", "Give one of them")
    if lora.q_lora and args.options.pure_bf16:
        yield ConfigError("--q_lora trains in float32, --pure_bf16 in bfloat16", "Give --bf16 instead of --pure_bf16")
    quantization = saved or lora.quantization
    if lora.use_lora and lora.q_lora and quantization and not quantization.is_packed and not args.dry_run:
        asking = "--q_lora" if saved is None else "--model_name_or_path"
        yield from _faults_of(check_bitsandbytes, f"{asking} ({quantization})")


def _check_optimizer(args: RunArguments) -> Faults:
    name = str(args.trainer_value("optim"))
    if not (
        name.startswith(("paged_", "ademamix", "rmsprop_bnb", "lion_")) or name in ("adamw_bnb_8bit", "adamw_8bit")
    ):
        return
    yield from _faults_of(check_bitsandbytes, f"--optim {name}")
    if args.trainer_value("use_cpu") or not has_gpu():
        yield ConfigError(f"--optim {name} needs a GPU, and there is none", "Leave it out")


def _check_continued_adapter(lora: LoraArguments) -> Faults:
    """Rank, scale and layers of an adapter that is continued are its own."""
    if not lora.lora_weight_path:
        return
    try:
        config = json.loads((Path(lora.lora_weight_path) / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        what = f"--lora_weight_path {lora.lora_weight_path}: there is no adapter"
        yield ConfigError(what, "Give a folder with an adapter_config.json")
        return
    for flag, key in (
        ("lora_r", "r"), ("lora_alpha", "lora_alpha"), ("lora_dropout", "lora_dropout"), ("lora_bias", "bias"),
        ("lora_target_modules", "target_modules"),
    ):  # fmt: skip
        given, default = getattr(lora, flag), LoraArguments.__dataclass_fields__[flag].default
        made = config.get(key)
        same = sorted(given) == sorted(made) if isinstance(given, list) and isinstance(made, list) else given == made
        if given != default and not same:
            shown = " ".join(given) if isinstance(given, list) else given
            yield ConfigError(
                f"--{flag} {shown}: the adapter of --lora_weight_path was made with {made}",
                f"Leave --{flag} out, or start a new adapter",
            )


def _check_model(args: RunArguments) -> Faults:
    name, length, folder = args.model.model_name_or_path, args.data.model_max_length, _model_folder(args)
    positions = most_positions(load_model_config(folder))
    if positions is not None and length > positions:
        yield ConfigError(
            f"--model_max_length {length} is more than the {positions} positions of {name}",
            f"Give {positions} or less",
        )
    targets = args.lora.lora_target_modules if args.lora.use_lora else None
    modules = module_names(folder) if targets else []
    unknown = [target for target in targets or () if not any(f".{module}".endswith(f".{target}") for module in modules)]
    if modules and unknown:
        layers = sorted({module.rpartition(".")[2] for module in modules if not _is_norm(module)})
        yield ConfigError(
            f"--lora_target_modules {' '.join(unknown)}: the model has no such layers", f"It has {', '.join(layers)}"
        )


def _model_folder(args: RunArguments) -> Path:
    return find_local_folder(args.model.model_name_or_path, args.model.cache_dir, args.model.model_hub)


def _is_norm(module: str) -> bool:
    name = module.rpartition(".")[2]
    return "norm" in name or name.startswith("ln_")


def _check_schedule(args: RunArguments) -> Faults:
    """Saving, evaluating, logging, and what depends on their order."""
    get, evaluates = args.trainer_value, _evaluates(args)
    for kind in ("logging", "eval", "save"):
        steps = get(f"{kind}_steps")
        if get(f"{kind}_strategy") == "steps" and steps is not None:
            if steps <= 0 and not (kind == "eval" and steps == 0):
                yield ConfigError(f"--{kind}_steps {steps:g} is not possible", "Give 1 or more, or a share of all")
            elif steps > 1 and steps != int(steps):
                yield ConfigError(f"--{kind}_steps {steps:g} is no whole number of steps", "Give one")
    best, save = get("load_best_model_at_end"), get("save_strategy")
    if best and not evaluates:
        yield ConfigError("--load_best_model_at_end needs evaluations", _EVALUATE)
    elif best and save not in ("best", get("eval_strategy")):
        yield ConfigError(
            f"--load_best_model_at_end: --save_strategy {save} and --eval_strategy {get('eval_strategy')} differ",
            "Give the same to both",
        )
    elif best and save == "steps":
        yield from _check_multiple(args)
    if save == "best" and not evaluates:
        yield ConfigError("--save_strategy best needs evaluations", _EVALUATE)
    if args.options.early_stopping_patience is not None and not best:
        yield ConfigError(
            f"--early_stopping_patience {args.options.early_stopping_patience} needs --load_best_model_at_end",
            f"Add it. {_EVALUATE}",
        )
    if get("lr_scheduler_type") in ("reduce_lr_on_plateau", "greedy") and not evaluates:
        yield ConfigError(
            f"--lr_scheduler_type {get('lr_scheduler_type')} needs evaluations",
            _EVALUATE,
        )
    metric = get("metric_for_best_model")
    known = ("loss", "token_accuracy")
    if metric is not None and metric.removeprefix("eval_") not in known:
        yield ConfigError(f"--metric_for_best_model {metric}: there is no such metric", f"Give {' or '.join(known)}")


def _check_multiple(args: RunArguments) -> Faults:
    """The best model can only be loaded again if it was saved, so every save has to follow an evaluation."""
    save, evaluate = args.trainer_value("save_steps"), args.trainer_value("eval_steps")
    evaluate = evaluate or args.trainer_value("logging_steps")
    if save <= 0 or evaluate <= 0:
        return  # said already
    mixed = (save < 1) != (evaluate < 1)
    quotient = save / evaluate
    if mixed or not math.isclose(quotient, round(quotient)) or round(quotient) < 1:
        yield ConfigError(
            f"--load_best_model_at_end: --save_steps {save:g} is no multiple of --eval_steps {evaluate:g}",
            "Save after every evaluation, or after every second, third...",
        )


def _check_services(args: RunArguments) -> Faults:
    get = args.trainer_value
    report_to = get("report_to") or []
    for name in [report_to] if isinstance(report_to, str) else report_to:
        if name in ("none", "all"):
            continue
        if name not in REPORTERS:
            near = nearest(name, REPORTERS)
            yield ConfigError(
                f"--report_to {name}: no such service{f'; the nearest is {near}' if near else ''}",
                f"Known are {', '.join(REPORTERS)}",
            )
        elif not any(importlib.util.find_spec(module) for module in REPORTERS[name]):
            yield ConfigError(f"--report_to {name}: it is not installed", f"pip install {name}, or leave it out")


def _check_output(args: RunArguments) -> Faults:
    if args.dry_run or not is_first():
        return  # the first process may be removing already what --overwrite_output_dir gives up
    faults = list(_faults_of(check_output, args)) or list(_faults_of(check_start, args))
    yield from faults
