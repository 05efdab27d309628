"""Checks of the arguments before anything is loaded. All faults are reported at once."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Iterator

from checkpoints.input_folders import check_model_files
from checkpoints.json_schemas import MAX_KEPT_SAMPLES
from checkpoints.model_config import check_bitsandbytes, find_quantization
from checkpoints.rope import find_yarn_fault, with_yarn
from console import pip_command
from data_utils.sources import parse_fill, parse_source
from errors import ConfigError, numbered
from evaluation.metrics import SCORES
from loading.chat_template_file import read_chat_template
from loading.config_files import load_model_config, max_positions, module_names
from processes import is_first
from qwen_model.architectures import ARCHITECTURES
from training.cache_entries import usable_folder
from training.config.args import RunArguments, parse_profile_steps
from training.config.flags import did_you_mean, nearest
from training.config.intervals import evaluation_steps
from training.data_workers import check_workers
from training.engine_checks import check_engine
from training.flag_checks import check_flags, warn_of_ignored_flags
from training.lora_checks import check_lora, faults_of, model_folder
from training.optimizer_checks import check_optimizer, check_schedule
from training.planned_device import lacks_gpu
from training.rope_checks import check_positions
from training.rows import ATTENTION, choose_packing
from training.run_folder.prepare import check_output
from training.run_folder.start import check_start

# Services of --report_to: the modules they are imported from.
REPORTERS = {
    "tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "swanlab": ("swanlab",),
    "mlflow": ("mlflow",), "comet_ml": ("comet_ml",), "clearml": ("clearml",), "codecarbon": ("codecarbon",),
    "dagshub": ("dagshub",), "dvclive": ("dvclive",), "neptune": ("neptune",), "trackio": ("trackio",),
    "azure_ml": ("azureml",), "kubeflow": ("kubeflow",), "flyte": ("flytekit",),
}  # fmt: skip

# Seconds. Imports and kernel compilation can block the heartbeat's thread for that long.
MIN_HEARTBEAT = 5

_POSITIVE_COUNTS = ("dataloader_prefetch_factor", "torch_empty_cache_steps", "ddp_bucket_cap_mb", "ddp_timeout")
_NOT_NEGATIVE = (
    "learning_rate", "weight_decay", "warmup_steps", "max_grad_norm", "adam_epsilon", "dataloader_num_workers",
    "eval_delay", "neftune_noise_alpha",
)  # fmt: skip
_MOST_EPOCHS = 10**6
_MOST_NOISE = 1000  # far more than the size of any embedding
_LEAST_PROCESSES = 16  # of --dataset_num_proc are accepted everywhere

_EVALUATE = "Give --eval_strategy, and --eval_data_path or --eval_split"

Faults = Iterator[ConfigError]


def check_args(args: RunArguments) -> None:
    """Check the arguments against each other, the checkpoint's config and the disk. Changes nothing.

    Logs flags that have no effect. Imports nothing heavy, except torch for flags that need a GPU.

    Raises:
        ConfigError: all faults; several are a numbered list.
    """
    checks: tuple[Callable[[RunArguments], Faults], ...] = (
        _check_data, _check_numbers, _check_precision, check_lora, _check_quantization, check_optimizer,
        check_schedule, check_flags, _check_model, _check_intervals, _check_reporters, check_engine, _check_held_out,
        _check_output,
    )  # fmt: skip
    # Several checks may meet the same fault of a file.
    faults = list({str(fault): fault for check in checks for fault in check(args)}.values())
    if len(faults) == 1:
        raise faults[0]
    if faults:
        raise ConfigError(numbered(f"{len(faults)} faults in the arguments", faults))
    warn_of_ignored_flags(args)


def _evaluates(args: RunArguments) -> bool:
    return bool(args.trainer_value("eval_strategy") != "no")


def _check_data(args: RunArguments) -> Faults:
    data, get = args.data, args.trainer_value
    if not data.data_path and not args.plan:
        yield ConfigError("--data_path is missing", "Give a file of conversations, or a folder of such files")
    for flag, names in (("--data_path", data.data_path), ("--eval_data_path", data.eval_data_path)):
        for name in names or ():
            yield from faults_of(parse_source, name, flag)
    yield from faults_of(parse_fill, data.fill or ())
    if args.model.chat_template is not None:
        yield from faults_of(read_chat_template, args.model.chat_template)
    if data.data_cache_dir is not None and not data.no_data_cache:
        yield from faults_of(usable_folder, data)
    if not 0 <= data.eval_split < 1:
        yield ConfigError(f"--eval_split {data.eval_split:g} is out of range", "Give a fraction from 0 to below 1")
    if data.eval_split and data.eval_data_path:
        what = f"--eval_split {data.eval_split:g} and --eval_data_path both select evaluation data"
        yield ConfigError(what, "Give one of them")
    flag = f"--eval_strategy {get('eval_strategy')}" if _evaluates(args) else "--eval_on_start"
    if (_evaluates(args) or get("eval_on_start")) and not (data.eval_data_path or data.eval_split):
        yield ConfigError(f"{flag} has no data to evaluate on", "Give --eval_data_path or --eval_split too")
    strategy = get("train_sampling_strategy")
    if data.data_mixing != "mixed" and strategy != "random":
        what = f"--data_mixing {data.data_mixing} and --train_sampling_strategy {strategy} are different orders"
        yield ConfigError(what, "Give one of them")
    if data.packing is True and strategy == "group_by_length":
        what = "--packing True and --train_sampling_strategy group_by_length are two ways to form batches"
        yield ConfigError(what, "Give one of them: packs are all of about the same length")
    config = load_model_config(model_folder(args))
    if config.get("model_type") in ARCHITECTURES:
        yield from faults_of(choose_packing, args, config)


def _check_numbers(args: RunArguments) -> Faults:
    get = args.trainer_value
    counts = {
        "model_max_length": args.data.model_max_length,
        "dataset_num_proc": args.data.dataset_num_proc,
        "per_device_train_batch_size": get("per_device_train_batch_size"),
        "per_device_eval_batch_size": get("per_device_eval_batch_size"),
        "gradient_accumulation_steps": get("gradient_accumulation_steps"),
        "lora_r": args.lora.lora_r,
        "lora_alpha": args.lora.lora_alpha,
        "save_total_limit": get("save_total_limit"),
        "early_stopping_patience": args.options.early_stopping_patience,
        **{name: get(name) for name in _POSITIVE_COUNTS},
    }
    for name, value in counts.items():
        least = 2 if name == "model_max_length" else 1  # the first token of a sample is no target
        if value is not None and value < least:
            yield ConfigError(f"--{name} {value} is out of range", f"Give {least} or more")
    most = max(_LEAST_PROCESSES, 4 * (os.cpu_count() or 1))
    if (count := args.data.dataset_num_proc) > most:
        fix = f"Give 1 to {most}: only as many as there are CPU cores work at the same time"
        yield ConfigError(f"--dataset_num_proc {count} is out of range", fix)
    for name in _NOT_NEGATIVE:
        if (value := get(name)) is not None and value < 0:
            yield ConfigError(f"--{name} {value} is out of range", "Give 0 or more")
    if (noise := get("neftune_noise_alpha")) is not None and noise > _MOST_NOISE:
        yield ConfigError(f"--neftune_noise_alpha {noise:g} is out of range", f"Give 0 to {_MOST_NOISE}, such as 5")
    for name in ("seed", "data_seed"):
        if (seed := get(name)) is not None and not 0 <= seed < 2**32:
            yield ConfigError(f"--{name} {seed} is out of range", f"Give 0 to {2**32 - 1}")
    fractions = {
        "lora_dropout": args.lora.lora_dropout, "adam_beta1": get("adam_beta1"), "adam_beta2": get("adam_beta2"),
        "label_smoothing_factor": get("label_smoothing_factor"),
    }  # fmt: skip
    for name, value in fractions.items():
        if not 0 <= value < 1:
            yield ConfigError(f"--{name} {value} is out of range", "Give 0 or more and less than 1")
    if (seconds := args.options.heartbeat_timeout) != 0 and seconds < MIN_HEARTBEAT:
        yield ConfigError(f"--heartbeat_timeout {seconds:g} is out of range", f"Give {MIN_HEARTBEAT} or more, or 0")
    if get("max_steps") == 0:
        yield ConfigError("--max_steps 0 trains nothing", "Give 1 or more, or leave it out")
    elif get("num_train_epochs") <= 0 and get("max_steps") < 0:
        yield ConfigError(f"--num_train_epochs {get('num_train_epochs')} trains nothing", "Give more than 0")
    if get("num_train_epochs") > _MOST_EPOCHS:
        yield ConfigError(
            f"--num_train_epochs {get('num_train_epochs'):g} is out of range", f"Give {_MOST_EPOCHS} or less"
        )
    if get("label_smoothing_factor") and args.model.loss != "lean":
        what = f"--label_smoothing_factor {get('label_smoothing_factor')} needs --loss lean"
        yield ConfigError(what, "Remove --label_smoothing_factor or --loss")
    if not 0 <= (count := args.options.keep_samples) <= MAX_KEPT_SAMPLES:
        yield ConfigError(f"--keep_samples {count} is out of range", f"Give 0 to {MAX_KEPT_SAMPLES}")
    if args.options.profile_steps is not None:
        yield from faults_of(parse_profile_steps, args.options.profile_steps)


def _check_precision(args: RunArguments) -> Faults:
    get, bf16 = args.trainer_value, "--pure_bf16" if args.options.pure_bf16 else "--bf16"
    if get("fp16") and (get("bf16") or args.options.pure_bf16):
        yield ConfigError(f"--fp16 and {bf16} are two precisions", "Give one of them")
    elif get("fp16") and lacks_gpu(args):
        yield ConfigError("--fp16 needs a GPU, and none is available", "Remove it, or use --bf16")
    if get("fp16_full_eval") and get("bf16_full_eval"):
        yield ConfigError("--fp16_full_eval and --bf16_full_eval are two precisions", "Give one of them")


def _check_quantization(args: RunArguments) -> Faults:
    """Check the quantisation flags against the checkpoint, whose config tells whether its weights are quantised."""
    lora, model = args.lora, f"--model_name_or_path {args.model.model_name_or_path}"
    try:
        saved = find_quantization(model_folder(args))
    except ConfigError as error:
        yield error
        return
    types = [f"--quant_type {lora.quant_type}"] if lora.quant_type else []
    types += ["--load_in_8bit"] if lora.load_in_8bit else []
    unquantised = "give an unquantised checkpoint"
    if saved and not lora.use_lora:
        if not args.dry_run:  # which shows the data only
            what = f"{model} is quantised ({saved}): its weights cannot be trained"
            yield ConfigError(what, f"Train an adapter with --use_lora --q_lora, or {unquantised}")
    elif saved and not lora.q_lora:
        yield ConfigError(f"{model} is quantised ({saved}): LoRA needs --q_lora", f"Add --q_lora, or {unquantised}")
    elif saved and types:
        what = f"{model} is quantised already ({saved}): {' and '.join(types)} does not apply"
        yield ConfigError(what, f"Remove {types[0]}")
    if types and lora.use_lora and not lora.q_lora:
        yield ConfigError(f"{' and '.join(types)} needs --q_lora", f"Add --q_lora, or remove {types[0]}")
    if len(types) == 2:
        yield ConfigError(f"{' and '.join(types)} are two types of quantisation", "Give one of them")
    if lora.q_lora and args.options.pure_bf16:
        yield ConfigError("--q_lora trains in float32, --pure_bf16 in bfloat16", "Give --bf16 instead of --pure_bf16")
    quantization = saved or lora.quantization
    if lora.use_lora and lora.q_lora and quantization and not quantization.is_packed and not args.dry_run:
        flag = "--q_lora" if saved is None else "--model_name_or_path"
        yield from faults_of(check_bitsandbytes, f"{flag} ({quantization})")


def _check_model(args: RunArguments) -> Faults:
    folder = model_folder(args)
    if os.path.isdir(folder):
        yield from faults_of(check_model_files, folder)
    yield from check_positions(args, load_model_config(folder))
    attention = args.model.attn_implementation or ""
    if attention.startswith("flash_attention") and attention not in ATTENTION:
        fix = f"Give one of {', '.join(name for name in ATTENTION if name)}"
        yield ConfigError(f"--attn_implementation {attention} is unknown", fix)
    targets = args.lora.lora_target_modules if args.lora.use_lora else None
    modules = module_names(folder) if targets else []
    unknown = [target for target in targets or () if not any(f".{module}".endswith(f".{target}") for module in modules)]
    if modules and unknown:
        layers = sorted({module.rpartition(".")[2] for module in modules if not _is_norm(module)})
        yield ConfigError(
            f"--lora_target_modules {' '.join(unknown)}: the model has no such layers",
            f"Choose from {', '.join(layers)}",
        )


def _is_norm(module: str) -> bool:
    name = module.rpartition(".")[2]
    return "norm" in name or name.startswith("ln_")


def _check_intervals(args: RunArguments) -> Faults:
    """Check when to log, evaluate and save, and the flags that depend on it."""
    get, evaluates = args.trainer_value, _evaluates(args)
    for kind in ("logging", "eval", "save"):
        steps = get(f"{kind}_steps")
        if get(f"{kind}_strategy") == "steps" and steps is not None:
            if steps <= 0 and not (kind == "eval" and steps == 0):
                fix = "Give a number of steps, or a fraction of all steps"
                yield ConfigError(f"--{kind}_steps {steps:g} is out of range", fix)
            elif steps > 1 and steps != int(steps):
                yield ConfigError(f"--{kind}_steps {steps:g} is not a whole number of steps", "Give a whole number")
    best, save = get("load_best_model_at_end"), get("save_strategy")
    if best and not evaluates:
        yield ConfigError("--load_best_model_at_end needs evaluations", _EVALUATE)
    elif best and save not in ("best", get("eval_strategy")):
        yield ConfigError(
            f"--load_best_model_at_end: --save_strategy {save} and --eval_strategy {get('eval_strategy')} differ",
            "Give the same strategy to both",
        )
    elif best and save == "steps":
        yield from _check_save_after_evaluation(args)
    if save == "best" and not evaluates:
        yield ConfigError("--save_strategy best needs evaluations", _EVALUATE)
    if args.options.early_stopping_patience is not None and not best:
        yield ConfigError(
            f"--early_stopping_patience {args.options.early_stopping_patience} needs --load_best_model_at_end",
            f"Add it. {_EVALUATE}",
        )
    metric, known = get("metric_for_best_model"), ("loss", "token_accuracy")
    name = (metric or "loss").removeprefix("eval_")
    if name in SCORES and args.options.eval_generate is None:
        yield ConfigError(f"--metric_for_best_model {metric} needs answers", "Add --eval_generate 50")
    elif name not in (*known, *SCORES):
        yield ConfigError(
            f"--metric_for_best_model {metric} is unknown",
            f"Give {' or '.join(known)}; with --eval_generate also {', '.join(SCORES)}",
        )


def _check_held_out(args: RunArguments) -> Faults:
    """Check ``--eval_generate``, which needs evaluations."""
    count, limit = args.options.eval_generate, args.options.eval_max_new_tokens
    if count is None:
        if limit != type(args.options)().eval_max_new_tokens:
            yield ConfigError(f"--eval_max_new_tokens {limit} needs --eval_generate", "Add it")
        return
    flag = f"--eval_generate {count}"
    if count < 1:
        yield ConfigError(f"{flag} is out of range", "Give 1 or more, or leave it out")
    if not (_evaluates(args) or args.trainer_value("eval_on_start")):
        yield ConfigError(f"{flag} needs evaluations", _EVALUATE)
    config = load_model_config(model_folder(args))
    yarn = None if not config or find_yarn_fault(config) else args.model.yarn
    positions = max_positions(with_yarn(config, yarn))
    if limit < 1:
        yield ConfigError(f"--eval_max_new_tokens {limit} is out of range", "Give 1 or more")
    elif positions is not None and limit >= positions:
        what = f"--eval_max_new_tokens {limit} leaves no room for a question in the {positions} positions of the model"
        yield ConfigError(what, f"Give less than {positions}")


def _check_save_after_evaluation(args: RunArguments) -> Faults:
    """Check that every save follows an evaluation, because only saved models can be loaded as the best one."""
    save = args.trainer_value("save_steps")
    evaluate = evaluation_steps(args.trainer_value("eval_steps"), args.trainer_value("logging_steps"))
    if save <= 0 or evaluate <= 0:
        return  # reported by the caller
    mixed = (save < 1) != (evaluate < 1)
    quotient = save / evaluate
    if mixed or not math.isclose(quotient, round(quotient)) or round(quotient) < 1:
        yield ConfigError(
            f"--load_best_model_at_end: --save_steps {save:g} is not a multiple of --eval_steps {evaluate:g}",
            "Save after every evaluation, or after every second, third...",
        )


def _check_reporters(args: RunArguments) -> Faults:
    report_to = args.trainer_value("report_to") or []
    for name in [report_to] if isinstance(report_to, str) else report_to:
        if name in ("none", "all"):
            continue
        if name not in REPORTERS:
            yield ConfigError(
                f"--report_to {name}: unknown service{did_you_mean(nearest(name, REPORTERS))}",
                f"Known are {', '.join(REPORTERS)}",
            )
        elif not any(importlib.util.find_spec(module) for module in REPORTERS[name]):
            yield ConfigError(f"--report_to {name}: not installed", f"{pip_command(name)}, or remove the flag")


def _check_output(args: RunArguments) -> Faults:
    """Check the output folder; its checkpoint is compared with the arguments only if the folder itself is accepted."""
    if args.dry_run or args.plan or not is_first():
        return  # rank 0 may already be removing the files that --overwrite_output_dir discards
    yield from faults_of(check_workers, args.trainer_value("dataloader_num_workers"))
    yield from list(faults_of(check_output, args)) or faults_of(check_start, args)
