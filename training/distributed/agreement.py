"""Check that all ranks train with the same inputs as rank 0: arguments, libraries, sources, model files and data.

Hosts with different learning rates, library versions or copies of the data would train without an error, to weights
that nobody can reproduce. So every difference is reported before the model is loaded.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints.files import load_json
from checkpoints.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from checkpoints.shards import fingerprint
from data_utils.examples import ExampleSet
from errors import ConfigError, numbered, shared
from training.distributed.world import World

if TYPE_CHECKING:
    from loading.checkpoint import Checkpoint
    from training.config.args import RunArguments

# Flags that may differ between ranks. For a flag with a path the files are compared instead.
_MAY_DIFFER = {
    "local_rank", "model_name_or_path", "lora_weight_path", "data_path", "eval_data_path", "deepspeed", "fsdp_config",
    "cache_dir", "data_cache_dir", "no_data_cache", "dataset_num_proc", "logging_dir", "hub_token", "debug",
    "log_level", "log_level_replica", "disable_tqdm",
}  # fmt: skip
_ONE_TIME_FLAGS = ("overwrite_output_dir", "allow_resume_changes", "dry_run", "plan")
_PACKAGES = (
    "torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "safetensors", "tokenizers", "tiktoken",
    "numpy",
)  # fmt: skip
# Environment variables that change results or communication.
_VARIABLES = (
    "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG", "PYTORCH_JIT",
    "TORCHDYNAMO_DISABLE", "NCCL_ALGO", "NCCL_PROTO", "NCCL_NVLS_ENABLE",
)  # fmt: skip
_SOURCES = (
    "console.py",
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
# Files that a run reads from a checkpoint folder besides the weights.
CONFIG_FILES = (
    "config.json", "generation_config.json", "*token*", "vocab.json", "merges.txt", "*.jinja", "chat_template*",
)  # fmt: skip
_MAX_SHOWN = 20

RankInputs = dict[str, Any]
"""Inputs of a rank by name, such as ``--learning_rate`` or ``torch``; values that JSON can represent."""


def check_agreement(world: World, args: RunArguments, checkpoint: Checkpoint, device: str) -> None:
    """Compare arguments, library versions, sources, model files and environment variables with those of rank 0.

    Args:
        device: type of the device, ``cpu`` or ``cuda``.

    Raises:
        ConfigError: the differences, with their ranks; raised on all ranks.
    """
    if world.size > 1:
        inputs = _process_inputs(args, device)
        if world.is_local_rank0:  # the ranks of a host read the same disk
            inputs |= _host_inputs(args, checkpoint)
        _compare(world, "agreement", inputs, "Start all processes with the same command and the same installation")


def check_same_data(world: World, sets: Mapping[str, ExampleSet]) -> None:
    """Compare the examples that each host has read with those of rank 0.

    Raises:
        ConfigError: the sets that differ, with their ranks; raised on all ranks.
    """
    if world.size > 1:
        inputs: RankInputs = {}
        if world.is_local_rank0:
            inputs = {
                f"the {name} set of": f"{len(examples):,} examples ({examples.digest()[:12]})"
                for name, examples in sets.items()
            }
        fix = "Give all hosts the same files: compare them with sha256sum, or put them on shared storage"
        _compare(world, "same data", inputs, fix)


def _compare(world: World, topic: str, inputs: RankInputs, fix: str) -> None:
    expected = world.broadcast_from_rank0(topic, inputs)
    differing = [[name, value, expected.get(name)] for name, value in inputs.items() if value != expected.get(name)]
    ranks_by_difference: dict[str, list[str]] = {}
    for rank, differences in enumerate(world.gather(f"{topic}: differences", differing)):
        for name, value, expected_value in differences:
            difference = f"{name} {_shown(value)}, {world.describe(0)}: {_shown(expected_value)}"
            ranks_by_difference.setdefault(difference, []).append(world.describe(rank))
    if not ranks_by_difference:
        return
    lines = [f"{_describe_ranks(ranks)}: {difference}" for difference, ranks in ranks_by_difference.items()]
    if len(lines) == 1:
        raise shared(ConfigError(lines[0], fix))
    title = f"the processes of this run differ in {len(lines)} ways"
    if len(lines) > _MAX_SHOWN:
        title += f", of which the first {_MAX_SHOWN} are"
    raise shared(ConfigError(f"{numbered(title, lines[:_MAX_SHOWN])}\n  {fix}"))


def _describe_ranks(ranks: list[str]) -> str:
    return ranks[0] if len(ranks) == 1 else f"{ranks[0]} and {len(ranks) - 1} more"


def _shown(value: Any) -> str:
    if value is None:
        return "(none)"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _process_inputs(args: RunArguments, device: str) -> RankInputs:
    flags = args.to_dict() | {name: getattr(args, name) for name in _ONE_TIME_FLAGS}
    flags["resume_from_checkpoint"] = args.resume
    inputs: RankInputs = {f"--{name}": value for name, value in flags.items() if name not in _MAY_DIFFER}
    inputs["device"] = device
    inputs |= {name: os.environ.get(name) for name in _VARIABLES}
    inputs["python"] = platform.python_version()
    for package in _PACKAGES:
        try:
            inputs[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            inputs[package] = None
    return dict(json.loads(json.dumps(inputs, default=str)))  # as other ranks receive it


def _host_inputs(args: RunArguments, checkpoint: Checkpoint) -> RankInputs:
    inputs: RankInputs = {
        "this toolkit's sources": digest_sources(Path(__file__).parents[2])[:12],
        "weights of --model_name_or_path": fingerprint(checkpoint.folder)[:12],
        "config of --model_name_or_path": digest_files(checkpoint.folder, *CONFIG_FILES)[:12],
    }
    if adapter := args.lora.lora_weight_path:
        inputs["weights of --lora_weight_path"] = fingerprint(adapter, ADAPTER_WEIGHTS)[:12]
        inputs["config of --lora_weight_path"] = digest_files(Path(adapter), ADAPTER_CONFIG)[:12]
    flags = args.to_dict()
    for name in ("deepspeed", "fsdp_config"):
        value = flags[name]
        if isinstance(value, str) and Path(value).is_file():
            content = json.dumps(load_json(Path(value)), sort_keys=True)
            value = hashlib.sha256(content.encode()).hexdigest()[:12]
        inputs[f"content of --{name}"] = value
    return inputs


def digest_sources(root: Path, names: Iterable[str] = _SOURCES) -> str:
    """Return the SHA-256 of the Python files of some modules and packages, by default of all that affect training."""
    paths = [path for name in names for path in sorted([root / name, *(root / name).rglob("*.py")])]
    return _digest([path for path in paths if path.is_file()], root)


def digest_files(folder: Path, *patterns: str) -> str:
    """Return the SHA-256 of the files in ``folder`` that match one of the patterns."""
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return _digest(sorted(paths), folder)


def _digest(paths: list[Path], root: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)} ".encode())
        digest.update(content)
    return digest.hexdigest()
