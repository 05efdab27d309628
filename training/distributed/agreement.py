"""Whether all processes are about to do the same: what each was given and runs on, compared with the first one.

Two hosts with another learning rate, another release of a library or another copy of the data train without a word, to
weights that nobody can make again. So what differs is said before the model is loaded.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints.files import load_json
from checkpoints.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from checkpoints.shards import fingerprint
from data_utils.dataset import ExampleSet
from errors import ConfigError, numbered, shared
from training.distributed.world import World

if TYPE_CHECKING:
    from loading.checkpoint import Checkpoint
    from training.config.args import RunArguments

# What a process may be told in its own way. Of what is read from such a path the content is compared.
_MAY_DIFFER = {
    "local_rank", "model_name_or_path", "lora_weight_path", "data_path", "eval_data_path", "deepspeed", "fsdp_config",
    "cache_dir", "logging_dir", "hub_token", "debug", "log_level", "log_level_replica", "disable_tqdm",
}  # fmt: skip
_SAID_ONCE = ("overwrite_output_dir", "allow_resume_changes", "dry_run")
_PACKAGES = (
    "torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "safetensors", "tokenizers", "tiktoken",
    "numpy",
)  # fmt: skip
# Variables that change what is computed, or how processes talk.
_VARIABLES = (
    "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG", "PYTORCH_JIT",
    "TORCHDYNAMO_DISABLE", "NCCL_ALGO", "NCCL_PROTO", "NCCL_NVLS_ENABLE",
)  # fmt: skip
_SOURCES = (
    "errors.py",
    "commands.py",
    "processes.py",
    "finetune.py",
    "chat",
    "qwen_model",
    "data_utils",
    "checkpoints",
    "loading",
    "training",
)
# What of a checkpoint's folder a run reads beside its weights.
_READ_BESIDE = ("config.json", "generation_config.json", "*token*", "vocab.json", "merges.txt", "*.jinja")
_MOST_SHOWN = 20

Facts = dict[str, Any]


def check_agreement(world: World, args: RunArguments, checkpoint: Checkpoint, device: str) -> None:
    """Compare arguments, library versions, the toolkit's sources, the base and the environment with the first process.

    Args:
        device: type of the device, ``cpu`` or ``cuda``.

    Raises:
        ConfigError: what differs, with the ranks, on all processes.
    """
    if world.size > 1:
        facts = _facts_of_process(args, device)
        if world.is_leader:  # what processes of a host read from the same disk
            facts |= _facts_of_host(args, checkpoint)
        _compare(world, "agreement", facts, "Start all processes with the same command and the same installation")


def check_same_data(world: World, sets: Mapping[str, ExampleSet]) -> None:
    """Compare the examples that each host has read with those of the first process.

    Raises:
        ConfigError: the sets that differ, with the ranks, on all processes.
    """
    if world.size > 1:
        facts: Facts = {}
        if world.is_leader:
            facts = {
                f"the {name} set of": f"{len(examples):,} examples ({examples.digest()[:12]})"
                for name, examples in sets.items()
            }
        fix = "Give all hosts the same files: compare them with sha256sum, or put them on storage that all of them see"
        _compare(world, "same data", facts, fix)


def _compare(world: World, topic: str, facts: Facts, fix: str) -> None:
    first = world.first_says(topic, facts)
    differing = [[name, value, first.get(name)] for name, value in facts.items() if value != first.get(name)]
    found: dict[str, list[str]] = {}  # ranks that differ in the same way
    for rank, lines in enumerate(world.gather(f"{topic}: what differs", differing)):
        for name, value, expected in lines:
            what = f"{name} {_shown(value)}, {world.describe(0)}: {_shown(expected)}"
            found.setdefault(what, []).append(world.describe(rank))
    if not found:
        return
    lines = [f"{_ranks(ranks)}: {what}" for what, ranks in found.items()]
    if len(lines) == 1:
        raise shared(ConfigError(lines[0], fix))
    title = f"the processes of this run differ in {len(lines)} ways"
    if len(lines) > _MOST_SHOWN:
        title += f", of which the first {_MOST_SHOWN} are"
    raise shared(ConfigError(f"{numbered(title, lines[:_MOST_SHOWN])}\n  {fix}"))


def _ranks(ranks: list[str]) -> str:
    return ranks[0] if len(ranks) == 1 else f"{ranks[0]} and {len(ranks) - 1} more"


def _shown(value: Any) -> str:
    if value is None:
        return "(none)"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _facts_of_process(args: RunArguments, device: str) -> Facts:
    flags = args.to_dict() | {name: getattr(args, name) for name in _SAID_ONCE}
    flags["resume_from_checkpoint"] = args.resume
    facts: Facts = {f"--{name}": value for name, value in flags.items() if name not in _MAY_DIFFER}
    facts["device"] = device
    facts |= {name: os.environ.get(name) for name in _VARIABLES}
    facts["python"] = platform.python_version()
    for package in _PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = None
    return dict(json.loads(json.dumps(facts, default=str)))  # as it comes out of the store


def _facts_of_host(args: RunArguments, checkpoint: Checkpoint) -> Facts:
    facts: Facts = {
        "this toolkit's sources": _digest_sources(Path(__file__).parents[2]),
        "weights of --model_name_or_path": fingerprint(checkpoint.folder)[:12],
        "config of --model_name_or_path": _digest_files(checkpoint.folder, *_READ_BESIDE),
    }
    if adapter := args.lora.lora_weight_path:
        facts["weights of --lora_weight_path"] = fingerprint(adapter, ADAPTER_WEIGHTS)[:12]
        facts["config of --lora_weight_path"] = _digest_files(Path(adapter), ADAPTER_CONFIG)
    for name in ("deepspeed", "fsdp_config"):
        value = args.trainer_value(name)
        if isinstance(value, str) and Path(value).is_file():
            content = json.dumps(load_json(Path(value)), sort_keys=True)
            value = hashlib.sha256(content.encode()).hexdigest()[:12]
        facts[f"what is in --{name}"] = value
    return facts


def _digest_sources(root: Path) -> str:
    """12 hex digits of the Python files of what trains."""
    paths = [path for name in _SOURCES for path in sorted([root / name, *(root / name).rglob("*.py")])]
    return _digest([path for path in paths if path.is_file()], root)


def _digest_files(folder: Path, *patterns: str) -> str:
    """12 hex digits of the files of a folder that match."""
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return _digest(sorted(paths), folder)


def _digest(paths: list[Path], root: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)} ".encode())
        digest.update(content)
    return digest.hexdigest()[:12]
