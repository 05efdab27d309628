"""Checks of single flags of transformers: those that cannot work here, and values that it would refuse late."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from errors import ConfigError
from processes import count_processes, has_gpu, is_first
from training.config.args import RunArguments
from training.config.engines import is_set
from training.config.objects import check_object, load_object
from training.config.optimizers import OPTIMIZERS
from training.config.schedules import SCHEDULES
from training.config.support import NO_EFFECT, OBJECTS, REFUSED
from training.inductor import missing_for_inductor
from training.planned_device import lacks_gpu

logger = logging.getLogger(__name__)

# torch's backends that train; others are for deployment or for other devices.
_COMPILE_BACKENDS = ("inductor", "aot_eager", "eager", "cudagraphs")
_COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
_TRACKIO = ("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "project")


def check_flags(args: RunArguments) -> Iterator[ConfigError]:
    """Yield every flag that is not supported, or whose value cannot work."""
    get = args.trainer_value
    for name, refusal in REFUSED.items():
        if is_changed(args, name):
            what = f"--{name} {get(name)} is not supported: {refusal.reason}"
            yield ConfigError(what, refusal.fix or f"Remove --{name}")
    for name, rules in OBJECTS.items():
        if get(name) is not None:
            try:
                yield from check_object(f"--{name}", load_object(f"--{name}", get(name)), rules)
            except ConfigError as error:
                yield error
    yield from _check_workers(args)
    yield from _check_offload(args)
    yield from _check_best(args)
    if get("auto_find_batch_size") and (count_processes() > 1 or is_set(get("deepspeed")) or is_set(get("fsdp"))):
        what = "--auto_find_batch_size works in one process without an engine: ranks would find different sizes"
        yield ConfigError(what, "Remove it, and lower --per_device_train_batch_size instead")
    if get("tf32") and lacks_gpu(args):
        yield ConfigError("--tf32 True needs a GPU, and none is available", "Remove --tf32")
    yield from _check_compile(args)


def is_changed(args: RunArguments, name: str) -> bool:
    """Return whether a flag of the installed transformers was given with a value other than its default."""
    return name in args.trainer_defaults and args.trainer_value(name) != args.trainer_defaults[name]


def warn_of_ignored_flags(args: RunArguments) -> None:
    """Log every given flag that has no effect, once per run."""
    if not is_first():
        return
    get = args.trainer_value
    for name, reason in NO_EFFECT.items():
        if is_changed(args, name) and not (name == "do_train" and args.trainer_value(name)):
            logger.warning("--%s has no effect: %s", name, reason)
    if get("auto_find_batch_size") and (get("use_cpu") or not has_gpu()):
        logger.warning("--auto_find_batch_size has no effect on a CPU: the longest micro-batch is tried on GPUs only")
    if (recomputed := get("gradient_checkpointing_kwargs")) and not get("gradient_checkpointing"):
        logger.warning("--gradient_checkpointing_kwargs %s has no effect without --gradient_checkpointing", recomputed)
    optimizer, schedule = str(args.trainer_value("optim")), str(args.trainer_value("lr_scheduler_type"))
    for flag, names in (
        (f"--optim {optimizer}", OPTIMIZERS[optimizer].ignores if optimizer in OPTIMIZERS else ()),
        (f"--lr_scheduler_type {schedule}",
         () if schedule not in SCHEDULES or SCHEDULES[schedule].warms_up else ("warmup_steps",)),
    ):  # fmt: skip
        for name in names:
            if name in args.trainer and is_changed(args, name):
                logger.warning("--%s %s has no effect with %s", name, args.trainer_value(name), flag)
    if optimizer.startswith("schedule_free_") and not schedule.startswith("constant"):
        logger.warning("--optim %s is meant for --lr_scheduler_type constant, not %s", optimizer, schedule)
    if "trackio" not in (args.trainer_value("report_to") or ()):
        for name in _TRACKIO:
            if is_changed(args, name):
                logger.warning("--%s has no effect without --report_to trackio", name)


def _check_workers(args: RunArguments) -> Iterator[ConfigError]:
    get = args.trainer_value
    if get("dataloader_num_workers") != 0:
        return
    for name in ("dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_multiprocessing_context"):
        if get(name):
            yield ConfigError(f"--{name} needs --dataloader_num_workers", "Give 1 or more workers")


def _check_offload(args: RunArguments) -> Iterator[ConfigError]:
    get = args.trainer_value
    recomputed = get("gradient_checkpointing_kwargs")
    if isinstance(recomputed, dict) and recomputed.get("offload") and lacks_gpu(args):
        what = "--gradient_checkpointing_kwargs: offload copies from a GPU to the host, and there is no GPU"
        yield ConfigError(what, "Remove offload")


def _check_best(args: RunArguments) -> Iterator[ConfigError]:
    """Check that the best model is not the one with the highest loss."""
    greater, metric = args.trainer_value("greater_is_better"), args.trainer_value("metric_for_best_model") or "loss"
    if greater is not None and greater == metric.endswith("loss"):
        best = "lowest" if greater else "highest"
        what = f"--greater_is_better {greater} selects the worst model: the best {metric} is the {best}"
        yield ConfigError(what, "Remove --greater_is_better")


def _check_compile(args: RunArguments) -> Iterator[ConfigError]:
    """Check ``--torch_compile``, which the other two flags imply."""
    get = args.trainer_value
    backend, mode = get("torch_compile_backend"), get("torch_compile_mode")
    if not (get("torch_compile") or backend is not None or mode is not None):
        return
    given = [name for name in ("torch_compile", "torch_compile_backend", "torch_compile_mode") if get(name)]
    flag = f"--{given[0]} {get(given[0])}" if given else "--torch_compile_backend"
    on_cpu = get("use_cpu") or not has_gpu()
    if backend is not None and backend not in _COMPILE_BACKENDS:
        what = f"--torch_compile_backend {backend} is not supported for training"
        yield ConfigError(what, f"Give one of {', '.join(_COMPILE_BACKENDS)}")
    elif backend == "cudagraphs" and on_cpu:
        yield ConfigError("--torch_compile_backend cudagraphs needs a GPU, and none is available", "Give inductor")
    if mode is not None and mode not in _COMPILE_MODES:
        yield ConfigError(f"--torch_compile_mode {mode} is unknown", f"Give one of {', '.join(_COMPILE_MODES)}")
    elif mode is not None and backend not in (None, "inductor"):
        what = f"--torch_compile_mode {mode} is a mode of inductor, not of --torch_compile_backend {backend}"
        yield ConfigError(what, "Remove one of them")
    if backend in (None, "inductor") and (missing := missing_for_inductor(on_cpu)):
        yield ConfigError(f"{flag} needs {missing}, which is not installed", "Install it, or remove the flag")
    if is_set(get("deepspeed")) or is_set(get("fsdp")):
        engine = "--deepspeed" if is_set(get("deepspeed")) else "--fsdp"
        yield ConfigError(f"{flag} is not supported with {engine}", "Remove one of them")
    elif args.lora.q_lora:
        yield ConfigError(f"{flag} is not supported with --q_lora", "Remove one of them")
