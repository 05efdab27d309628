"""Settings that may differ between a checkpoint and the command that resumes it. Imports no torch.

A run's facts are a dict of JSON values, saved in the manifest of its checkpoints:

    mode         full, lora or q-lora
    embeddings   which embedding rows train beside an adapter: full, chatml_tokens or none
    base         fingerprint of the base model's weights
    data         digest of each set's examples
    packs        most tokens of a pack of training samples; 0 if they are not packed
    world_size   number of processes
    engine       how they share the model: none, ddp, zero1 to zero3, fsdp2
    arguments    every flag with its value
    versions     of the libraries

Facts that are not known yet, or that an older checkpoint does not contain, are left out and not compared.
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

RunFacts = Mapping[str, Any]

# Paths of inputs: their content is compared by fingerprint and digest.
_FACT_OF_INPUT = {
    "model_name_or_path": "base", "lora_weight_path": "base", "data_path": "data", "eval_data_path": "data",
}  # fmt: skip
_INPUT_PATHS = frozenset(_FACT_OF_INPUT)
# How records become examples: compared by the digest of the examples.
_ENCODING = frozenset({
    "eval_split", "data_format", "fill", "on_bad_record", "system_message", "label_mask", "truncation",
    "model_max_length", "allow_special_tokens", "chat_template", "thinking", "split_turns", "preserve_thinking",
    "reasoning_effort",
})  # fmt: skip
# Which model is trained, which of its parameters, and what their optimizer stores: a checkpoint fits no other values.
_PARAMETERS = frozenset({
    "lora_r", "lora_alpha", "lora_target_modules", "lora_bias", "quant_type", "load_in_8bit", "pure_bf16", "optim",
    "lora_rank_pattern", "lora_alpha_pattern", "use_rslora", "use_dora", "init_lora_weights", "loraplus_lr_ratio",
    "rope_scaling", "rope_factor", "rope_original_length",
})  # fmt: skip
# Compared as `mode`, `embeddings` and `packs`.
_MODE = frozenset({"use_lora", "q_lora", "trainable_embeddings", "packing"})
# The order of examples.
_ORDER = frozenset({"seed", "data_seed", "data_mixing", "train_sampling_strategy", "dataloader_drop_last"})
_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
# Stored in the optimizer's state, which the checkpoint restores.
_OPTIMIZER_STATE = frozenset({"weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args"})
# Flags that change no step: logging, saving, evaluating, and how the work is distributed.
_HARMLESS_PREFIXES = (
    "logging_", "log_", "save_", "eval_", "hub_", "push_to_", "report_to", "run_name", "project", "trackio_",
    "dataloader_", "include_", "ddp_", "deepspeed", "fsdp", "per_device_eval_", "batch_eval_", "skip_memory_",
    "torch_empty_", "gradient_checkpointing",
)  # fmt: skip
_HARMLESS = frozenset({
    "output_dir", "resume_from_checkpoint", "overwrite_output_dir", "allow_resume_changes", "dry_run", "plan",
    "debug", "any_base", "cache_dir", "data_cache_dir", "no_data_cache", "dataset_num_proc", "model_hub",
    "disable_tqdm", "do_train", "do_eval", "do_predict", "prediction_loss_only",
    "local_rank", "heartbeat_timeout", "keep_samples", "profile_steps", "lazy_preprocess", "full_determinism",
    "remove_unused_columns", "label_names", "length_column_name", "accelerator_config",
    "restore_callback_states_from_checkpoint", "bf16_full_eval", "fp16_full_eval", "auto_find_batch_size", "use_cache",
    "use_cpu", "use_liger_kernel",
})  # fmt: skip


@dataclass
class Differences:
    """Differences between a run and a checkpoint, a line each, by their consequence."""

    refused: list[str] = field(default_factory=list)
    needs_permission: list[str] = field(default_factory=list)  # allowed with --allow_resume_changes
    undecided: list[str] = field(default_factory=list)  # other paths of inputs that have not been read yet
    warned: list[str] = field(default_factory=list)


def mode_of(arguments: Mapping[str, Any]) -> str:
    """Return ``full``, ``lora`` or ``q-lora``, from the flags."""
    if not arguments["use_lora"]:
        return "full"
    return "q-lora" if arguments["q_lora"] else "lora"


def facts_from_args(args: RunArguments) -> dict[str, Any]:
    """Return the facts that the command line alone determines."""
    arguments = json.loads(json.dumps(args.to_dict(), default=str))
    return {
        "mode": mode_of(arguments),
        "world_size": count_processes(),
        "engine": find_engine(arguments).name,
        "arguments": arguments,
    }


def check_changes(facts: RunFacts, saved: RunFacts, checkpoint: object, allowed: bool) -> list[str]:
    """Compare a run with the checkpoint that it resumes.

    Args:
        saved: the facts in the checkpoint's manifest.
        allowed: ``--allow_resume_changes`` was given.

    Returns:
        The accepted differences, a line each, for the log.
    Raises:
        ConfigError: all differences that are not accepted.
    """
    differences = compare(facts, saved)
    if not differences.refused and (allowed or not differences.needs_permission):
        return differences.needs_permission + differences.warned
    fix = (
        "Another run needs another --output_dir"
        if differences.refused
        else "Restore these settings, or add --allow_resume_changes to resume with the changes"
    )
    lines = differences.refused + ([] if allowed else differences.needs_permission) + differences.undecided
    title = f"--resume_from_checkpoint: {checkpoint} does not belong to this run"
    if len(lines) == 1:
        raise ConfigError(f"{title}: {lines[0]}", fix)
    raise ConfigError(numbered(title, lines) + f"\n  {fix}")


def compare(facts: RunFacts, saved: RunFacts) -> Differences:
    """Return the differences between a run and the facts in a manifest."""
    result = Differences()
    new, old = _known_to_both(facts, saved)
    for name, title in (("mode", "mode"), ("embeddings", "trained embeddings")):
        if new.get(name) != old.get(name):
            result.refused.append(f"{title}: {new[name]}, not {old[name]}")
    if new.get("base") != old.get("base"):
        result.refused.append("base model: its weights differ from those that the checkpoint was trained from")
    arguments = dict(_differing_arguments(facts, saved))
    for name, line in arguments.items():
        if name in _PARAMETERS:
            result.refused.append(line)
        elif name in _ORDER:
            result.needs_permission.append(line)
        elif name in _INPUT_PATHS and _FACT_OF_INPUT[name] not in new:
            result.undecided.append(f"{line} (its content has not been compared yet)")
        elif name in _OPTIMIZER_STATE:
            result.warned.append(f"{line}; the checkpoint's value stays in effect")
        elif name not in {*_INPUT_PATHS, *_ENCODING, *_MODE, *_BATCH} and not _is_harmless(name):
            result.warned.append(line)
    _compare_data(new, old, arguments, result)
    if new.get("packs") != old.get("packs"):
        lines = [f"packs of {side['packs']} tokens" if side["packs"] else "no packing" for side in (new, old)]
        result.needs_permission.append(f"training samples: {lines[0]}, not {lines[1]}")
    _compare_batch(facts, saved, result)
    for name, version in new.get("versions", {}).items():
        if (other := old["versions"].get(name, version)) != version:
            result.warned.append(f"{name} {version}, not {other}: rounding may differ")
    if saved.get("arguments", {}).get("save_only_model"):
        result.needs_permission.append(
            "saved with --save_only_model: optimizer, schedule and random state start from scratch"
        )
    return result


def find_differing_arguments(facts: RunFacts, recorded: RunFacts, compares_paths: bool = True) -> list[str]:
    """Return the arguments that make this run a different one, a line each.

    Args:
        recorded: ``{"arguments": ...}`` of the run that a folder belongs to.
        compares_paths: include the paths of model and data; where their content is compared, the same files may have
            another path now.
    """
    ignored = set() if compares_paths else _INPUT_PATHS - {"lora_weight_path"}
    return [
        line for name, line in _differing_arguments(facts, recorded) if not _is_harmless(name) and name not in ignored
    ]


def _known_to_both(facts: RunFacts, saved: RunFacts) -> tuple[dict[str, Any], dict[str, Any]]:
    names = [name for name in facts if facts[name] is not None and saved.get(name) is not None]
    return {name: facts[name] for name in names}, {name: saved[name] for name in names}


def _is_harmless(name: str) -> bool:
    compared_elsewhere = _INPUT_PATHS | _ENCODING | _ORDER
    return name in _HARMLESS or (name.startswith(_HARMLESS_PREFIXES) and name not in compared_elsewhere)


def _differing_arguments(facts: RunFacts, saved: RunFacts) -> Iterator[tuple[str, str]]:
    """Yield name and line of each flag whose value differs; flags that only one side knows are skipped."""
    new, old = facts.get("arguments") or {}, saved.get("arguments") or {}
    for name in new:
        if name in old and _comparable(name, new[name]) != _comparable(name, old[name]):
            yield name, f"--{name} {_format(new[name])}, not {_format(old[name])}"


def _comparable(name: str, value: Any) -> Any:
    return sorted(value) if isinstance(value, list) and name == "lora_target_modules" else value


def _format(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "(not given)" if value is None else str(value)


def _compare_data(
    new: Mapping[str, Any], old: Mapping[str, Any], arguments: Mapping[str, str], result: Differences
) -> None:
    """Compare the examples: other training data change every step, other evaluation data only which is best."""
    causes = "; ".join(line for name, line in arguments.items() if name in _ENCODING)
    digests = [facts.get("data", {}) for facts in (new, old)]
    for name, title, lines in (
        ("train", "training data", result.needs_permission),
        ("eval", "evaluation data", result.warned),
    ):
        if len({digest.get(name) for digest in digests}) > 1:
            lines.append(f"{title}: the examples differ" + (f" ({causes})" if causes else ""))
    if not new.get("data") and causes:  # not read yet
        result.needs_permission.append(f"data: {causes}")


def _compare_batch(facts: RunFacts, saved: RunFacts, result: Differences) -> None:
    """Compare the examples per step, their distribution, and the engine."""
    new, old = ([side.get("arguments", {}).get(name) for name in _BATCH] for side in (facts, saved))
    sizes = [side.get("world_size") for side in (facts, saved)]
    engines = [side.get("engine") for side in (facts, saved)]
    if None not in engines and set(engines) != {engines[0]} and set(engines) != {"none", "ddp"}:
        result.refused.append(f"engine: {engines[0]}, not {engines[1]}; their optimizer states are not compatible")
    if None in (*new, *old, *sizes) or [*new, sizes[0]] == [*old, sizes[1]]:
        return
    (device, steps), (old_device, old_steps) = new, old
    line = (
        f"batch: {device} per device x {steps} accumulated x {sizes[0]} processes, "
        f"not {old_device} x {old_steps} x {sizes[1]}"
    )
    if sizes[0] != sizes[1] and str(engines[1]).startswith("zero"):
        result.refused.append(f"{line}; {engines[1]} shards the optimizer state by process")
    else:
        result.needs_permission.append(line)
