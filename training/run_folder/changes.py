"""What may differ between a checkpoint and the command that goes on from it. Imports no torch.

A run is known by its facts, a dict that JSON can hold and that a checkpoint's manifest keeps:

    mode         full, lora or q-lora
    embeddings   what trains of them beside an adapter: full, chatml_tokens or none
    base         the fingerprint of the base's weights
    data         the digest of each set's examples
    world_size   processes
    engine       how they share the model: none, ddp, zero1 to zero3, fsdp2
    arguments    every flag with its value
    versions     of the libraries

What is not known yet, or was not when the checkpoint was written, is left out and not compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from errors import ConfigError, numbered
from processes import count_processes
from training.config.args import RunArguments
from training.config.engines import find_engine

Facts = Mapping[str, Any]

# Where the inputs lie; what they hold is compared by fingerprint and digest.
_PLACES = frozenset({"model_name_or_path", "data_path", "eval_data_path", "lora_weight_path"})
# How examples are made of the data: the digest tells.
_OF_DATA = frozenset({
    "eval_split", "data_format", "fill", "on_bad_record", "system_message", "label_mask", "truncation",
    "model_max_length",
})  # fmt: skip
# What is trained and what its optimizer keeps: a checkpoint fits nothing else.
_FIXED = frozenset({
    "lora_r", "lora_alpha", "lora_target_modules", "lora_bias", "quant_type", "load_in_8bit", "pure_bf16", "optim",
})  # fmt: skip
# Part of `mode` and of `embeddings`.
_IN_MODE = frozenset({"use_lora", "q_lora", "trainable_embeddings"})
# Which examples come when.
_ORDER = frozenset({"seed", "data_seed", "data_mixing", "train_sampling_strategy", "dataloader_drop_last"})
_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
# Held by the optimizer's state, which is the checkpoint's.
_KEPT = frozenset({"weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args"})
# What leaves every step as it is: what is said, shown, saved and measured, and how the work is laid out.
_HARMLESS_STARTS = (
    "logging_", "log_", "save_", "eval_", "hub_", "push_to_", "report_to", "run_name", "project", "trackio_",
    "dataloader_", "include_", "ddp_", "deepspeed", "fsdp", "per_device_eval_", "batch_eval_", "skip_memory_",
    "torch_empty_", "gradient_checkpointing",
)  # fmt: skip
_HARMLESS = frozenset({
    "output_dir", "resume_from_checkpoint", "overwrite_output_dir", "allow_resume_changes", "dry_run", "debug",
    "cache_dir", "model_hub", "disable_tqdm", "do_train", "do_eval", "do_predict", "prediction_loss_only", "local_rank",
    "heartbeat_timeout", "profile_steps", "lazy_preprocess", "full_determinism", "remove_unused_columns", "label_names",
    "length_column_name", "accelerator_config", "restore_callback_states_from_checkpoint", "bf16_full_eval",
    "fp16_full_eval", "auto_find_batch_size", "use_cache", "use_cpu", "use_liger_kernel",
})  # fmt: skip


@dataclass
class Differences:
    """What differs, a line each, by what comes of it."""

    refused: list[str] = field(default_factory=list)
    by_leave: list[str] = field(default_factory=list)  # with --allow_resume_changes
    warned: list[str] = field(default_factory=list)


def mode_of(arguments: Facts) -> str:
    """``full``, ``lora`` or ``q-lora``, from the flags."""
    if not arguments["use_lora"]:
        return "full"
    return "q-lora" if arguments["q_lora"] else "lora"


def facts_from_args(args: RunArguments) -> dict[str, Any]:
    """What is known of a run by its command line alone."""
    arguments = json.loads(json.dumps(args.to_dict(), default=str))
    return {
        "mode": mode_of(arguments),
        "world_size": count_processes(),
        "engine": find_engine(args.trainer).name,
        "arguments": arguments,
    }


def check_changes(facts: Facts, saved: Facts, checkpoint: object, allowed: bool) -> list[str]:
    """Compare a run with the checkpoint it is to go on from.

    Args:
        saved: the facts in the checkpoint's manifest.
        allowed: whether ``--allow_resume_changes`` was given.

    Returns:
        What differs and is accepted, a line each, for the log.
    Raises:
        ConfigError: what differs and is not; all of it.
    """
    found = compare(facts, saved)
    if not found.refused and (allowed or not found.by_leave):
        return found.by_leave + found.warned
    fix = (
        "Another run needs another --output_dir"
        if found.refused
        else "Give what the checkpoint was made with, or --allow_resume_changes to go on all the same"
    )
    lines = found.refused + ([] if allowed else found.by_leave)
    if len(lines) == 1:
        raise ConfigError(f"--resume_from_checkpoint: {checkpoint} is not of this run: {lines[0]}", fix)
    raise ConfigError(numbered(f"--resume_from_checkpoint: {checkpoint} is not of this run", lines) + f"\n  {fix}")


def compare(facts: Facts, saved: Facts) -> Differences:
    """What differs between a run and the facts in a manifest."""
    found = Differences()
    new, old = _known(facts, saved)
    for name, title in (("mode", "mode"), ("embeddings", "trained embeddings")):
        if new.get(name) != old.get(name):
            found.refused.append(f"{title}: {new[name]}, not {old[name]}")
    if new.get("base") != old.get("base"):
        found.refused.append("weights of the base model: others than those that the checkpoint was made with")
    arguments = dict(_differing_arguments(facts, saved))
    for name, line in arguments.items():
        if name in _FIXED:
            found.refused.append(line)
        elif name in _ORDER:
            found.by_leave.append(line)
        elif name in _KEPT:
            found.warned.append(f"{line}; the checkpoint's stays in force")
        elif name not in {*_PLACES, *_OF_DATA, *_IN_MODE, *_BATCH} and not _is_harmless(name):
            found.warned.append(line)
    _compare_data(new, old, arguments, found)
    _compare_batch(facts, saved, found)
    for name, version in new.get("versions", {}).items():
        if (other := old["versions"].get(name, version)) != version:
            found.warned.append(f"{name} {version}, not {other}: rounding may differ")
    if saved.get("arguments", {}).get("save_only_model"):
        found.by_leave.append("it was saved with --save_only_model: optimizer, schedule and random state start anew")
    return found


def differing_run(facts: Facts, recorded: Facts) -> list[str]:
    """What in the arguments makes another run of it, a line each: also where the inputs lie.

    Args:
        recorded: ``{"arguments": ...}`` of the run that a folder is of.
    """
    return [line for name, line in _differing_arguments(facts, recorded) if not _is_harmless(name)]


def _known(facts: Facts, saved: Facts) -> tuple[dict[str, Any], dict[str, Any]]:
    """What both sides know."""
    names = [name for name in facts if facts[name] is not None and saved.get(name) is not None]
    return {name: facts[name] for name in names}, {name: saved[name] for name in names}


def _is_harmless(name: str) -> bool:
    said_elsewhere = _PLACES | _OF_DATA | _ORDER
    return name in _HARMLESS or (name.startswith(_HARMLESS_STARTS) and name not in said_elsewhere)


def _differing_arguments(facts: Facts, saved: Facts) -> Iterator[tuple[str, str]]:
    """Name and line of each flag that both sides know and that has two values."""
    new, old = facts.get("arguments") or {}, saved.get("arguments") or {}
    for name in new:
        if name in old and _plain(name, new[name]) != _plain(name, old[name]):
            yield name, f"--{name} {_shown(new[name])}, not {_shown(old[name])}"


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, list) and name == "lora_target_modules":
        return sorted(value)
    return value


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "(not given)" if value is None else str(value)


def _compare_data(new: Facts, old: Facts, arguments: Mapping[str, str], found: Differences) -> None:
    """Other examples to train on change every step, others to evaluate on only what is best."""
    causes = "; ".join(line for name, line in arguments.items() if name in _OF_DATA)
    digests = [facts.get("data", {}) for facts in (new, old)]
    for name, lines in (("train", found.by_leave), ("eval", found.warned)):
        if len({digest.get(name) for digest in digests}) > 1:
            lines.append(f"data to {name}: other examples than before" + (f" ({causes})" if causes else ""))
    if not new.get("data") and causes:  # not read yet
        found.by_leave.append(f"data: {causes}")


def _compare_batch(facts: Facts, saved: Facts, found: Differences) -> None:
    """Examples per step, how they are laid out, and who shares the model how."""
    new, old = ([side.get("arguments", {}).get(name) for name in _BATCH] for side in (facts, saved))
    ranks = [side.get("world_size") for side in (facts, saved)]
    engines = [side.get("engine") for side in (facts, saved)]
    if None not in engines and set(engines) != {engines[0]} and set(engines) != {"none", "ddp"}:
        found.refused.append(f"engine: {engines[0]}, not {engines[1]}; each keeps the optimizer in its own way")
    if None in (*new, *old, *ranks) or [*new, ranks[0]] == [*old, ranks[1]]:
        return
    (device, steps), (old_device, old_steps) = new, old
    line = (
        f"batch: {device} per device x {steps} accumulated x {ranks[0]} processes, "
        f"not {old_device} x {old_steps} x {ranks[1]}"
    )
    if ranks[0] != ranks[1] and str(engines[1]).startswith("zero"):
        found.refused.append(f"{line}; {engines[1]} divides the optimizer among its processes")
    else:
        found.by_leave.append(line)
