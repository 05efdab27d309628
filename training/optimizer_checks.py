"""Checks of optimizer and schedule: packages, devices, and the arguments that transformers reads late or not at all."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

from checkpoints.model_config import check_bitsandbytes
from console import pip_command
from errors import ConfigError
from training.config.args import RunArguments
from training.config.engines import is_set
from training.config.flags import did_you_mean, nearest
from training.config.objects import check_object
from training.config.optimizers import OPTIMIZERS, Kind, Optimizer
from training.config.schedules import SCHEDULES
from training.inductor import missing_for_inductor
from training.planned_device import lacks_gpu

_OTHER = "Choose another optimizer"
_KINDS = {"float": "a number", "int": "a whole number", "bool": "true or false", "true": "true"}


def check_optimizer(args: RunArguments) -> Iterator[ConfigError]:
    """Yield every fault of ``--optim``, ``--optim_args`` and ``--optim_target_modules``."""
    get, name = args.trainer_value, str(args.trainer_value("optim"))
    flag, optimizer = f"--optim {name}", OPTIMIZERS.get(name)
    if optimizer is None:  # of a version of transformers that is newer than the table
        yield ConfigError(f"{flag} is not known to work", f"Choose from {', '.join(OPTIMIZERS)}")
        return
    if optimizer.refused:
        yield ConfigError(f"{flag} is not supported: {optimizer.refused}", _OTHER)
        return
    yield from check_package(flag, optimizer)
    on_cpu = (optimizer.needs_gpu or optimizer.compiles) and lacks_gpu(args)
    if optimizer.compiles and (missing := missing_for_inductor(on_cpu)):
        yield ConfigError(f"{flag} needs {missing}, which is not installed", f"Install it. {_OTHER}")
    if optimizer.needs_gpu and on_cpu:
        yield ConfigError(f"{flag} needs a GPU, and none is available", _OTHER)
    yield from _check_arguments(flag, optimizer, get("optim_args"))
    targets = get("optim_target_modules")
    if optimizer.needs_targets and not targets:
        fix = "Give --optim_target_modules all-linear, or names of layers"
        yield ConfigError(f"{flag} needs the layers that it trains in low rank", fix)
    elif targets and not optimizer.needs_targets:
        shown = targets if isinstance(targets, str) else " ".join(targets)
        what = f"--optim_target_modules {shown} has no effect with {flag}"
        yield ConfigError(what, "Remove it, or choose galore_adamw or apollo_adamw")
    if name.startswith("schedule_free_") and is_set(get("deepspeed")):
        # DeepSpeed never switches the optimizer between its forms for training and evaluation.
        yield ConfigError(f"{flag} is not supported with --deepspeed", f"Remove --deepspeed. {_OTHER}")
    warmup = get("warmup_steps")
    if name in ("schedule_free_adamw", "schedule_free_sgd") and 0 < warmup < 1:
        # They divide by this number: the first step would be taken with many times the learning rate.
        default = "" if "warmup_steps" in args.trainer else " (the default)"
        what = f"{flag} warms up over whole steps, and --warmup_steps {warmup:g}{default} is a fraction of all steps"
        yield ConfigError(what, "Give --warmup_steps as a number of steps, such as 0")


def check_package(flag: str, optimizer: Optimizer) -> Iterator[ConfigError]:
    """Yield the fault if the package of an optimizer is not installed."""
    package, module = optimizer.package
    if module == "bitsandbytes":
        try:
            check_bitsandbytes(flag)
        except ConfigError as error:
            yield error
    elif module and importlib.util.find_spec(module) is None:
        fix = f"{pip_command(package)}, or {_OTHER.lower()}"
        yield ConfigError(f"{flag} needs {package}, which is not installed", fix)


def _check_arguments(flag: str, optimizer: Optimizer, text: str | None) -> Iterator[ConfigError]:
    """Check ``--optim_args name=value,name=value``."""
    if text and "nesterov=true" in text.lower() and "momentum=" not in text:
        yield ConfigError(f"--optim_args {text}: nesterov needs a momentum", "Add momentum=0.9")
    known = optimizer.arguments
    takes = f"It takes {', '.join(known)}" if known else "It takes none: remove --optim_args"
    for pair in text.replace(" ", "").split(",") if text else ():
        name, equals, value = pair.partition("=")
        if not equals or not name or "=" in value:
            yield ConfigError(f"--optim_args {text}: {pair!r} is not name=value", "Write name=value,name=value")
        elif name not in known:
            hint = did_you_mean(nearest(name, known))
            yield ConfigError(f"--optim_args {text}: {flag} has no argument {name}{hint}", takes)
        elif not _is_of_kind(known[name], value):
            kind = known[name]
            expected = f"one of {', '.join(kind)}" if isinstance(kind, tuple) else _KINDS[kind]
            fix = "Leave it out to switch it off" if kind == "true" else f"Give {expected}"
            yield ConfigError(f"--optim_args {text}: {name} is {value!r}, not {expected}", fix)


def _is_of_kind(kind: Kind, text: str) -> bool:
    if isinstance(kind, tuple):
        return text in kind
    if kind in ("bool", "true"):
        return text.lower() in (("true", "false") if kind == "bool" else ("true",))
    try:
        return (int if kind == "int" else float)(text) >= 0  # NaN is not
    except ValueError:
        return False


def check_schedule(args: RunArguments) -> Iterator[ConfigError]:
    """Yield every fault of ``--lr_scheduler_type`` and ``--lr_scheduler_kwargs``."""
    get, name = args.trainer_value, str(args.trainer_value("lr_scheduler_type"))
    flag, schedule = f"--lr_scheduler_type {name}", SCHEDULES.get(name)
    if schedule is None:
        yield ConfigError(f"{flag} is not known to work", f"Choose from {', '.join(SCHEDULES)}")
        return
    if schedule.needs_evaluations and get("eval_strategy") == "no":
        yield ConfigError(f"{flag} needs evaluations", "Give --eval_strategy, and --eval_data_path or --eval_split")
    values = get("lr_scheduler_kwargs") or {}
    yield from check_object("--lr_scheduler_kwargs", values, schedule.arguments, flag)
    given = [key for key in schedule.one_of if values.get(key) is not None]
    if len(given) > 1:
        yield ConfigError(f"--lr_scheduler_kwargs: {' and '.join(given)} exclude each other", "Give one of them")
    elif schedule.one_of and not given:
        key, example = schedule.one_of[0], {"num_decay_steps": "100"}.get(schedule.one_of[0], "1e-6")
        yield ConfigError(f"{flag} needs {key}", f"Give --lr_scheduler_kwargs '{{\"{key}\": {example}}}'")
    yield from _check_end_rate(flag, name, values, get("learning_rate"))


def _check_end_rate(flag: str, name: str, values: Mapping[str, Any], rate: float) -> Iterator[ConfigError]:
    """Check that the lowest learning rate of a schedule is not above ``--learning_rate``."""
    key, default = {"polynomial": ("lr_end", 1e-7), "greedy": ("min_lr", 1e-3)}.get(name, ("min_lr", 0.0))
    lowest = values.get(key, default)
    if rate >= 0 and isinstance(lowest, int | float) and (lowest > rate or (lowest == rate and name == "polynomial")):
        yield ConfigError(
            f"{flag}: its lowest rate, {key} {lowest:g}, is above --learning_rate {rate:g}",
            f"Give --lr_scheduler_kwargs '{{\"{key}\": {rate / 10:g}}}'",
        )
