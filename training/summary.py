"""Records of a run: the block it logs at the start, its arguments, its facts, and the summary it writes at the end."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import platform
import shlex
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from torch import nn

from checkpoints.files import save_json
from checkpoints.names import DATA_REPORT_PAGE, LOSS_CURVE, RUN_ARGUMENTS, RUN_SUMMARY, TRAINING_LOG
from checkpoints.shards import fingerprint
from console import pip_command, python_command
from data_utils.examples import ExampleSet
from data_utils.report.counts import counted
from data_utils.report.data_report import DataReport, count_steps
from loading.adapters import EmbeddingsPolicy
from loading.checkpoint import Checkpoint
from loading.opened_by import opening_commands
from loading.quantized import count_elements, count_weights
from qwen_model.delta_net import KERNELS, describe
from training.callbacks import RunLog
from training.config.args import RunArguments
from training.config.schedules import SCHEDULES
from training.data import packs_samples, save_reports
from training.freed_memory import describe_memory
from training.learnt import describe_learnt, measure_learnt, warn_of_little
from training.longest_batch import positions_of
from training.ornaments import ornament
from training.progress import peak_memory
from training.run_folder.changes import facts_from_args
from training.run_folder.curves import plot_losses
from training.samplers import PackedExamples, build_sampler
from training.samples import keep_samples
from training.trainer import QwenTrainer

logger = logging.getLogger(__name__)

FEW_STEPS = 20  # with which `benchmarks.teach` taught nothing


def count_parameters(model: nn.Module | None) -> tuple[int, int]:
    """Return the number of trained parameters, and of all."""
    assert model is not None, "the Trainer has a model"
    trained = sum(count_elements(parameter) for parameter in model.parameters() if parameter.requires_grad)
    return trained, count_weights(model)


def record_start(
    trainer: QwenTrainer,
    args: RunArguments,
    sets: dict[str, ExampleSet],
    policy: EmbeddingsPolicy | None,
    memory: str = "",
) -> None:
    """Log the start-up block, write ``run_args.json``, data reports and samples; on rank 0, which alone has reports.

    Args:
        memory: what is known about the memory that a step takes.
    """
    if trainer.is_world_process_zero():
        save_arguments(args)
        logger.info("Fine-tuning\n%s", describe_run(trainer, args, sets["train"], policy, memory))
        warn_of_few_steps(trainer)
        if trainer.args.torch_compile:
            logger.info("--torch_compile compiles during the first steps, which take minutes")
        save_reports({name: examples.report for name, examples in sets.items()}, args.output_dir)
        keep_samples(sets["train"], args.options.keep_samples, args.trainer_value("seed"), args.output_dir)


def record_end(
    trainer: QwenTrainer,
    args: RunArguments,
    log: RunLog,
    sets: dict[str, ExampleSet],
    policy: EmbeddingsPolicy | None,
    seconds: float,
) -> None:
    """Write ``run_summary.json`` and log its result, on rank 0 only; then draw the loss curve and end the trackers.

    The model has been saved before: nothing that fails here loses it.

    Args:
        seconds: of training.
    """
    if trainer.is_world_process_zero():
        learnt: dict[str, Any] = {}
        with ornament("the comparison with training samples"):
            learnt = measure_learnt(trainer, sets["train"], args.options.keep_samples, seconds)
        summary = save_summary(trainer, args, log, sets, policy, seconds, learnt)
        with ornament("the loss curve"):
            plot_losses({"": log.rows}, args.output_dir / LOSS_CURVE, f"Loss of {args.output_dir.absolute().name}")
        warn_of_little(learnt, log.losses(), trainer.args.learning_rate)
        logger.info(
            "Done: %s\n%s", describe_result(summary), describe_output(args, trainer.checkpoint, sets["train"].report)
        )
    trainer.ornaments.end()
    with ornament("the end of --report_to"):
        trainer.accelerator.end_training()


def describe_run(
    trainer: QwenTrainer, args: RunArguments, examples: ExampleSet, policy: EmbeddingsPolicy | None, memory: str = ""
) -> str:
    """Return the start-up block: model, mode, trained parameters, data, steps."""
    training, checkpoint = trainer.args, trainer.checkpoint
    trained, total = count_parameters(trainer.model)
    batch, per_epoch, steps = _steps_of(trainer)
    mode = "LoRA" if isinstance(trainer.model, PeftModel) else "all parameters"
    if quantization := checkpoint.quantization or args.lora.quantization:
        mode = f"LoRA on quantised weights ({quantization})"
    mode += f" ({method})" if (method := method_of(trainer.model, args)) else ""
    report = examples.report.total()
    samples = f" in {report.samples:,} samples" if report.samples != report.kept else ""
    rows = [
        (
            "model",
            f"{checkpoint.name} ({checkpoint.model_type}, saved in {str(checkpoint.dtype).removeprefix('torch.')})",
        ),
        ("mode", f"{mode}, {args.precision} on {training.device}"),
        ("embeddings", f"{policy.mode} ({policy.reason})" if policy else "trained with the rest"),
        ("trained", f"{trained:,} of {total:,} parameters ({trained / total:.2%})"),
        ("data", f"{report.kept:,} of {report.read:,} {report.noun}{samples}, {report.tokens:,} tokens"),
        *_source_rows(examples.report),
        ("targets", f"{report.trained_tokens:,} tokens ({report.trained_tokens / report.tokens:.1%})"),
        *_packing_rows(trainer, args, batch),
        ("steps", f"{steps:,} of {counted(batch, _items_of(trainer))} ({per_epoch:,} per epoch)"),
        *_joined_rows(trainer),
        *_delta_net_rows(trainer),
        *([("expected", memory)] if memory else []),
        ("output", str(args.output_dir)),
        *([("memory", describe_memory(trainer.keeps_freed_memory(policy)))] if training.device.type == "cpu" else []),
    ]
    return "\n".join(f"  {name:<11}{value}" for name, value in rows)


def method_of(model: nn.Module | None, args: RunArguments) -> str:
    """Return what makes a training another than that of a plain LoRA; a continued adapter keeps its own options."""
    lora, noise = args.lora, args.trainer_value("neftune_noise_alpha")
    if isinstance(model, PeftModel) and lora.lora_weight_path:
        config: Any = model.peft_config["default"]
        lora = replace(
            lora,
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            lora_rank_pattern=config.rank_pattern,
            lora_alpha_pattern=config.alpha_pattern,
        )
    return ", ".join(filter(None, (lora.method, f"NEFTune {noise:g}" if noise else "")))


def _steps_of(trainer: QwenTrainer) -> tuple[int, int, int]:
    """Return the samples or packs of an optimizer step, the steps of an epoch, and those of the run."""
    flags, items = trainer.args, trainer.train_dataset
    accumulation = flags.gradient_accumulation_steps
    batch = flags.train_batch_size * accumulation * flags.world_size
    schedule = (flags.num_train_epochs, flags.max_steps, accumulation, flags.dataloader_drop_last)
    return batch, *count_steps(len(items), batch, *schedule)  # type: ignore[arg-type]


def _items_of(trainer: QwenTrainer) -> str:
    packed = isinstance(trainer.train_dataset, PackedExamples)
    return "packs" if packed else "samples"


def _packing_rows(trainer: QwenTrainer, args: RunArguments, batch: int) -> list[tuple[str, str]]:
    """Return what ``--packing`` has made of the examples, in which a batch of N is N packs."""
    packs = trainer.train_dataset
    if not isinstance(packs, PackedExamples):
        return []
    reason = " (--packing auto: there is plain text)" if args.data.packing == "auto" else ""
    capacity, size = packs.capacity, trainer.args.train_batch_size
    tokens = round(batch * capacity * packs.fill)
    return [
        ("packing", f"{len(packs):,} packs of up to {capacity:,} tokens, {packs.fill:.1%} filled{reason}"),
        ("", f"--per_device_train_batch_size {size}: {size * capacity:,} tokens; about {tokens:,} per optimizer step"),
    ]


def _joined_rows(trainer: QwenTrainer) -> list[tuple[str, str]]:
    """Return how many rows the micro-batches of a step are joined to, by the order of the first epoch."""
    joining, items = trainer.joining(), cast(Any, trainer.train_dataset)
    sampler = build_sampler(trainer.args, trainer.data_mixing, items, len(items)) if joining.budget else None
    if sampler is None:
        return []
    per_step = joining.rows_per_step(positions_of(items.lengths, [*sampler], trainer.args.train_batch_size, False))
    if per_step == joining.accumulation:
        return []
    text = f"{joining.accumulation} micro-batches of a step are joined to about {per_step:.1f} rows"
    return [("rows", f"{text} of up to {joining.budget:,} tokens")]


def _delta_net_rows(trainer: QwenTrainer) -> list[tuple[str, str]]:
    """Return what computes the delta nets of a model that has some."""
    text = describe(cast(nn.Module, trainer.model))
    if text and KERNELS not in text and trainer.args.device.type == "cuda":
        text += f"; faster: {pip_command(KERNELS)}"
    return [("delta nets", text)] if text else []


def warn_of_few_steps(trainer: QwenTrainer) -> None:
    """Warn if small data gives too few optimizer steps to learn anything, unless ``--max_steps`` asks for them.

    A single step is always warned about if it is one of warm-up, which begins with the learning rate 0.
    """
    batch, _, steps = _steps_of(trainer)
    flags, schedule = trainer.args, trainer.args.lr_scheduler_type
    warms_up = SCHEDULES[name].warms_up if (name := str(getattr(schedule, "value", schedule))) in SCHEDULES else True
    if steps == 1 and warms_up and flags.get_warmup_steps(steps):
        logger.warning(
            "The only optimizer step has the learning rate 0, with which --warmup_steps %g begins: nothing is trained. "
            "Give --warmup_steps 0, or more steps",
            flags.warmup_steps,
        )
    if steps < FEW_STEPS and flags.max_steps <= 0:
        sizes = {
            "gradient_accumulation_steps": flags.gradient_accumulation_steps,
            "per_device_train_batch_size": flags.train_batch_size,
            "model_max_length": getattr(trainer.train_dataset, "capacity", 1),
        }
        lower = " or ".join(f"--{name} {value}" for name, value in sizes.items() if value > 1)
        change = f"Lower {lower}, or raise" if lower else "Raise"
        logger.warning(
            "The run has only %d optimizer steps, of %s each, which teach little. %s --num_train_epochs %g; "
            "docs/training.md has a recipe",
            steps, counted(batch, _items_of(trainer)), change, flags.num_train_epochs,
        )  # fmt: skip


def _source_rows(report: DataReport) -> list[tuple[str, str]]:
    if len(report.sources) == 1:
        return []
    return [
        ("", f"{source.kept:,} of {source.read:,} from {source.name} ({source.format})") for source in report.sources
    ]


def result_step(trainer: QwenTrainer) -> int:
    """Return the step whose weights are the result: the last, or the best with ``--load_best_model_at_end``."""
    takes_best = trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None
    best: int | None = trainer.state.best_global_step if takes_best else None
    return trainer.state.global_step if best is None else best


def describe_result(summary: dict[str, Any]) -> str:
    """Return the summary of ``save_summary`` in a few lines."""
    line = f"{summary['steps']} steps in {summary['seconds']:.0f} s"
    if summary["first_loss"] is not None:
        line += f", loss {summary['first_loss']:.4g} at first, {summary['end_loss']:.4g} over the last fifth"
        line += f", token accuracy {summary['last_token_accuracy']:.1%}"
    return "\n  learnt     ".join([line, *describe_learnt(summary["learnt"])])


def prompt_flags(args: RunArguments, report: DataReport) -> list[str]:
    """Return the flags of scripts.ask with which its prompts are those of training, where they are not the default."""
    flags, total = [], report.total()
    if (thinking := args.data.thinking) in ("on", "off"):
        flags += ["--thinking", thinking]
    elif report.settings.has_switch and total.answers_with_thinking in (0, total.answers_trained):
        flags += ["--thinking", "on" if total.answers_with_thinking else "off"]
    for name in ("preserve_thinking", "reasoning_effort"):
        if (value := getattr(args.data, name)) is not None:
            flags += [f"--{name}", value]
    return flags


def describe_output(args: RunArguments, checkpoint: Checkpoint, report: DataReport) -> str:
    """Return what lies in the output folder, and the commands that use it.

    Args:
        report: of the training data.
    """
    flags = list(map(shlex.quote, prompt_flags(args, report)))
    folder = args.output_dir
    base: object = Path(args.model.model_name_or_path) if args.model.model_hub == "hf" else checkpoint.folder
    question = '"Who are you?"'
    if args.lora.use_lora:
        merged = folder.with_name(f"{folder.name}-merged")
        rows = [
            ("adapter", str(folder)),
            (
                "ask",
                python_command("-m scripts.ask --model_name_or_path", base, "--adapter", folder, *flags, question),
            ),
            ("merge", python_command("merge_lora.py --adapter", folder, "--output", merged)),
        ]
    else:
        commands = opening_commands(folder, {"model_type": checkpoint.model_type}, flags)
        rows = [
            ("model", str(folder)),
            *((name, line) for name, lines in commands.items() for line in lines),
        ]
    rows.insert(1, ("records", f"{LOSS_CURVE}, {TRAINING_LOG}, {DATA_REPORT_PAGE}, {RUN_SUMMARY}"))
    return "\n".join(f"  {name:<11}{value}" for name, value in rows)


def save_arguments(args: RunArguments) -> None:
    """Write every flag with its value to ``run_args.json``."""
    values = json.loads(json.dumps(args.to_dict(), default=str))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    save_json(values, args.output_dir / RUN_ARGUMENTS)


def run_facts(
    args: RunArguments, checkpoint: Checkpoint, sets: dict[str, ExampleSet], policy: EmbeddingsPolicy | None
) -> dict[str, Any]:
    """Return all facts that a run's checkpoints record, see ``training.run_folder.changes``."""
    return {
        **facts_from_args(args),
        "embeddings": None if policy is None else policy.mode,
        "base": fingerprint(checkpoint.folder),
        "data": {name: examples.digest() for name, examples in sets.items()},
        "packs": args.data.model_max_length if packs_samples(args, checkpoint, sets["train"]) else 0,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that the result depends on."""
    packages = ("torch", "transformers", "peft", "accelerate", "safetensors", "tiktoken")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


_DATA_KEYS = ("path", "read", "kept", "skipped", "truncated", "tokens", "trained_tokens", "skipped_at", "truncated_at")


def _data_summary(examples: ExampleSet, digest: str) -> dict[str, Any]:
    """Return the main figures of ``data_receipt.json``, with the digest of the examples."""
    report = examples.report.as_dict()
    return {**{key: report[key] for key in _DATA_KEYS}, "digest": digest}


def save_summary(
    trainer: QwenTrainer,
    args: RunArguments,
    log: RunLog,
    sets: dict[str, ExampleSet],
    policy: EmbeddingsPolicy | None,
    seconds: float,
    learnt: dict[str, Any],
) -> dict[str, Any]:
    """Write ``run_summary.json`` and return its content."""
    trained, total = count_parameters(trainer.model)
    quantization = trainer.checkpoint.quantization or args.lora.quantization
    losses, eval_losses, accuracies = (log.losses(name) for name in ("loss", "eval_loss", "token_accuracy"))
    summary = {
        "base_model": trainer.checkpoint.name,
        "base_fingerprint": trainer.facts["base"],
        "base_is_quantized": trainer.checkpoint.quantization is not None,
        "model_type": trainer.checkpoint.model_type,
        "mode": "lora" if isinstance(trainer.model, PeftModel) else "full",
        "method": method_of(trainer.model, args) or None,
        "quantization": None if quantization is None else str(quantization),
        "trainable_embeddings": None if policy is None else {"mode": policy.mode, "reason": policy.reason},
        "trained_parameters": trained,
        "parameters": total,
        "data": {name: _data_summary(examples, trainer.facts["data"][name]) for name, examples in sets.items()},
        "steps": trainer.state.global_step,
        "result_step": result_step(trainer),
        "trained_tokens": trainer.progress.total.targets,
        "trained_samples": trainer.progress.total.samples,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "end_loss": statistics.fmean(end) if (end := losses[-max(1, len(losses) // 5) :]) else None,
        "last_eval_loss": eval_losses[-1] if eval_losses else None,
        "last_token_accuracy": accuracies[-1] if accuracies else None,
        "learnt": learnt,
        "padding": round(trainer.progress.total.padding, 4),
        "seconds": round(seconds, 3),
        "trained_tokens_per_second": round(trainer.progress.total.targets / seconds, 1),
        "peak_memory": peak_memory(),
        "versions": versions(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    save_json(summary, args.output_dir / RUN_SUMMARY)
    return summary
