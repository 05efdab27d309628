"""Checks of the adapter's flags: without an adapter, beside the one that is continued, and of its method."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from checkpoints.adapter_config import load_adapter_config
from checkpoints.files import load_json_or_empty
from checkpoints.input_folders import check_files
from checkpoints.names import ADAPTER_CONFIG
from checkpoints.patterns import check_patterns, module_pattern
from errors import ConfigError
from loading.config_files import find_local_folder, load_model_config, module_names
from qwen_model.architectures import ARCHITECTURES
from training.config.args import LoraArguments, RunArguments
from training.config.engines import Engine, find_engine
from training.config.flags import did_you_mean, nearest
from training.config.optimizers import OPTIMIZERS

_INITS = ("true", "gaussian", "orthogonal", "pissa", "olora")
_ITERATED = re.compile(r"pissa_niter_[1-9]\d?")
# Initialisations of peft that are refused, with the reason.
_REFUSED_INITS = {
    "false": "B would begin at random, and the model as another one than its base",
    "eva": "it reads activations of the training data before the first step",
    "corda": "it reads activations of the training data before the first step",
    "lora_ga": "it reads gradients of the training data before the first step",
    "loftq": "it changes the quantised weights, so the adapter would fit no other copy of them",
    "mica": "the older versions of peft do not know it",
}
_MOST_RANK, _MOST_ALPHA = 10**5, 10**9  # what adapter_config.json may hold

Faults = Iterator[ConfigError]


def faults_of(check: Callable[..., object], *arguments: object) -> Faults:
    """Yield the fault that a check raises."""
    try:
        check(*arguments)
    except ConfigError as error:
        yield error


def model_folder(args: RunArguments) -> Path:
    return find_local_folder(args.model.model_name_or_path, args.model.cache_dir, args.model.model_hub)


def check_lora(args: RunArguments) -> Faults:
    lora = args.lora
    if lora.use_lora:
        yield from _check_continued_adapter(lora)
        with suppress(ConfigError):  # reported by `check_engine`
            yield from _check_method(args, find_engine(args.trainer))
        yield from _check_patterns(args)
        return
    for item in fields(LoraArguments):
        value = getattr(lora, item.name)
        # Without LoRA the embeddings always train, so "full" is accepted.
        if value != item.default and not (item.name == "trainable_embeddings" and value == "full"):
            shown = "" if value is True else " " + (" ".join(value) if isinstance(value, list) else str(value))
            yield ConfigError(
                f"--{item.name}{shown} needs --use_lora: without it all parameters are trained",
                f"Add --use_lora, or remove --{item.name}",
            )


def _check_continued_adapter(lora: LoraArguments) -> Faults:
    """Check that no flag contradicts the rank, scale and layers of an adapter that is continued."""
    if not lora.lora_weight_path:
        return
    adapter = Path(lora.lora_weight_path)
    try:
        config = load_adapter_config(adapter, "--lora_weight_path")
        check_files(adapter)
    except ConfigError as error:
        yield error
        return
    for flag, key in (
        ("lora_r", "r"), ("lora_alpha", "lora_alpha"), ("lora_dropout", "lora_dropout"), ("lora_bias", "bias"),
        ("lora_target_modules", "target_modules"), ("use_rslora", "use_rslora"), ("use_dora", "use_dora"),
        ("lora_rank_pattern", "rank_pattern"), ("lora_alpha_pattern", "alpha_pattern"),
    ):  # fmt: skip
        value, default = getattr(lora, flag), LoraArguments.__dataclass_fields__[flag].default
        saved = config.get(key, False if default is False else None)
        same = sorted(value) == sorted(saved) if isinstance(value, list) and isinstance(saved, list) else value == saved
        if value != default and not same:
            shown = " ".join(value) if isinstance(value, list) else value
            yield ConfigError(
                f"--{flag} {shown}: the adapter of --lora_weight_path has {saved}",
                f"Remove --{flag}, or train a new adapter",
            )


def _check_method(args: RunArguments, engine: Engine) -> Faults:
    """Check how the adapter begins, and what its method works with."""
    lora = args.lora
    init, flag = lora.init_lora_weights.lower(), f"--init_lora_weights {lora.init_lora_weights}"
    if init not in _INITS and not _ITERATED.fullmatch(init):
        reason = f" is not supported: {_REFUSED_INITS[init]}" if init in _REFUSED_INITS else " is unknown"
        hint = "" if init in _REFUSED_INITS else did_you_mean(nearest(init, _INITS))
        yield ConfigError(
            f"{flag}{reason}{hint}", f"Choose from {', '.join(_INITS)}, pissa_niter_N with N from 1 to 99"
        )
    elif init != "true" and lora.lora_weight_path:
        what = f"{flag}: the adapter of --lora_weight_path {lora.lora_weight_path} has its values already"
        yield ConfigError(what, "Remove one of them")
    elif lora.takes_weights:
        yield from _check_part_of_weights(args, engine, flag)
    elif init == "orthogonal":
        for rank in {lora.lora_r, *(lora.lora_rank_pattern or {}).values()}:
            if isinstance(rank, int) and rank % 2:
                yield ConfigError(f"{flag} needs even ranks, not {rank}", f"Give {rank + 1}, or another initialisation")
    if lora.use_dora or _continued_config(lora).get("use_dora"):
        yield from _check_dora(engine)
    if lora.loraplus_lr_ratio != 1:
        yield from _check_rate_ratio(args, engine)


def _continued_config(lora: LoraArguments) -> dict[str, Any]:
    """Return the options of the adapter that is continued; empty if there is none, or none that can be read."""
    if not lora.lora_weight_path:
        return {}
    return load_json_or_empty(Path(lora.lora_weight_path) / ADAPTER_CONFIG)


def _check_part_of_weights(args: RunArguments, engine: Engine, flag: str) -> Faults:
    if args.lora.use_dora:
        yield ConfigError(f"{flag} and --use_dora both change how a layer is computed", "Give one of them")
    if args.lora.q_lora:
        what = f"{flag}: a part of quantised weights has the error of their quantisation, which it would not repair"
        yield ConfigError(what, "Remove it, or --q_lora")
    if engine.is_deepspeed or engine.shards_parameters:
        yield ConfigError(
            f"{flag} is not supported with {engine.title}, whose checkpoints lack its first values",
            "Train with DDP (no engine), or remove it",
        )


def _check_dora(engine: Engine) -> Faults:
    if engine.shards_parameters:
        what = f"--use_dora is not supported with {engine.title}: the norms of the weights need all of each weight"
        yield ConfigError(what, "Remove it, or use ZeRO-2 or DDP")


def _check_rate_ratio(args: RunArguments, engine: Engine) -> Faults:
    ratio, optim = args.lora.loraplus_lr_ratio, str(args.trainer_value("optim"))
    if not 0 < ratio <= 10**6:
        yield ConfigError(f"--loraplus_lr_ratio {ratio:g} is out of range", "Give more than 0, such as 16; 1 is off")
    if optim in OPTIMIZERS and OPTIMIZERS[optim].needs_targets:
        what = f"--loraplus_lr_ratio {ratio:g}: --optim {optim} groups the parameters in its own way"
        yield ConfigError(what, "Remove one of them")
    if engine.is_deepspeed and engine.config.get("optimizer"):
        what = f"--loraplus_lr_ratio {ratio:g}: the optimizer of the file of --deepspeed has a single learning rate"
        yield ConfigError(what, "Remove optimizer from the file: --optim and --learning_rate do the same")


def _check_patterns(args: RunArguments) -> Faults:
    """Check the ranks and alphas of single layers against the names of the layers that are adapted."""
    lora, ranks, alphas = args.lora, args.lora.lora_rank_pattern or {}, args.lora.lora_alpha_pattern or {}
    faults = [
        *_faults_of_values("--lora_rank_pattern", ranks, _is_rank, f"a whole number from 1 to {_MOST_RANK}"),
        *_faults_of_values("--lora_alpha_pattern", alphas, _is_alpha, f"a number above 0, up to {_MOST_ALPHA:g}"),
    ]
    yield from faults
    if faults or not (ranks or alphas):
        return
    folder = model_folder(args)
    architecture = ARCHITECTURES.get(load_model_config(folder).get("model_type", ""))
    targets = lora.lora_target_modules or (architecture.lora_targets if architecture else ())
    modules = module_names(folder)
    adapted = [name for name in modules if any(f".{name}".endswith(f".{target}") for target in targets)]
    yield from faults_of_patterns(lora, adapted)


def faults_of_patterns(lora: LoraArguments, adapted: Sequence[str]) -> Faults:
    """Check that each key of a pattern is an expression that matches a layer.

    Args:
        adapted: names of the adapted layers; empty: not known yet.
    """
    for option in ("rank_pattern", "alpha_pattern"):
        flag, patterns = f"--lora_{option}", getattr(lora, f"lora_{option}") or {}
        unusable = [*faults_of(check_patterns, {option: patterns}, adapted, flag)]
        yield from unusable
        for key in patterns if adapted and not unusable else ():
            if not any(re.match(module_pattern(key), name) for name in adapted):
                what = f"{flag}: {key!r} matches no adapted layer"
                yield ConfigError(what, f"Write the end of a name, such as {adapted[0].partition('.')[2]!r}")


def _faults_of_values(flag: str, values: Mapping[str, Any], fits: Callable[[Any], bool], expected: str) -> Faults:
    for key, value in values.items():
        if not fits(value):
            yield ConfigError(f"{flag}: {key!r} is {value!r}", f"Give {expected}")


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MOST_RANK


def _is_alpha(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= _MOST_ALPHA
