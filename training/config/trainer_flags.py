"""The flags of the installed transformers' ``TrainingArguments``, read from its source.

Importing transformers' trainer takes seconds, parsing its source 20 milliseconds, so ``--help`` and refusals are fast.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

from console import pip_command
from errors import ConfigError
from training.config.defaults import training_defaults
from training.config.flags import Flag, flag_of
from training.config.intervals import EVAL_STEPS, LOGGING_STEPS, SHORT_RUN
from training.config.support import NO_EFFECT, REFUSED

# transformers looks a log level up without a check: an unknown one would end in a KeyError.
_LOG_LEVELS = ("debug", "detail", "info", "warning", "error", "critical", "passive")

# Flags whose name, type or help differs here, in the same way for all versions of transformers.
_REPLACED = (
    Flag(
        "gradient_checkpointing", frozenset({"bool"}), False, bare=True,
        help="recompute activations in the backward pass: less memory, slower steps",
    ),
    Flag(
        "gradient_checkpointing_kwargs", frozenset({"dict"}), None, optional=True,
        help="arguments of torch.utils.checkpoint",
    ),
    Flag(
        "resume_from_checkpoint", frozenset({"str"}), None, optional=True, bare="True",
        help="checkpoint-* folder to resume from; True: the newest intact checkpoint in --output_dir; auto: "
        "the same, or start a new run if there is none",
    ),
    Flag(
        "logging_steps", frozenset({"float"}), None, optional=True,
        help=f"log every N steps, or below 1 a fraction of all steps (default: {LOGGING_STEPS}, and each step of runs "
        f"of up to {SHORT_RUN} steps)",
    ),
    Flag(
        "eval_steps", frozenset({"float"}), None, optional=True,
        help="evaluate every N steps, or below 1 a fraction of all steps (default: --logging_steps if it is given, "
        f"else {EVAL_STEPS})",
    ),
    Flag(
        "lr_scheduler_kwargs", frozenset({"dict"}), None, optional=True,
        help="further arguments of the schedule, such as {\"min_lr\": 1e-6}",
    ),
    Flag(
        "include_num_input_tokens_seen", frozenset({"str", "bool"}), "no", bare=True,
        choices=("all", "non_padding", "no"), help="count the tokens that the model has seen",
    ),
    Flag(
        "dataloader_multiprocessing_context", frozenset({"str"}), None, optional=True,
        choices=("fork", "spawn", "forkserver"), help="how workers are started",
    ),
    Flag(
        "train_sampling_strategy", frozenset({"str"}), "random", choices=("random", "sequential", "group_by_length"),
        help="order of the conversations; group_by_length: similar lengths in one batch, which saves padding",
        hint="batch_rebalance cannot be continued exactly after a resume",
    ),
    Flag(
        "debug", frozenset({"bool", "str"}), False, bare=True, choices=("underflow_overflow",),
        help="show the traceback of a failure; also accepts transformers' underflow_overflow",
    ),
    Flag(
        "fsdp", frozenset({"bool"}), False, bare=True, help="shard the model over all processes with FSDP2",
        hint="FSDP2 needs no words such as full_shard or auto_wrap; --fsdp_config '{\"cpu_offload\": true}' replaces "
        "offload, '{\"reshard_after_forward\": false}' shard_grad_op",
    ),
    Flag("output_dir", frozenset({"str"}), "trainer_output", help="folder for checkpoints and results"),
)  # fmt: skip
# Newer names of two flags above, and another way to save on SIGTERM, which is always done here.
_OURS = ("gradient_checkpointing", "gradient_checkpointing_kwargs")  # always, although transformers may drop them
_REMOVED = ("activation_checkpointing", "activation_checkpointing_kwargs", "enable_jit_checkpoint")


@cache
def trainer_flags() -> dict[str, Flag]:
    """Return transformers' flags under the names used here, which are the same for all its versions."""
    flags = {name: flag for name, flag in transformers_flags().items() if name not in _REMOVED}
    flags |= {flag.name: flag for flag in _REPLACED if flag.name in flags or flag.name in _OURS}
    with_lora = training_defaults(use_lora=True)
    for name, default in training_defaults(use_lora=False).items():
        lora_default = with_lora[name] if with_lora[name] != default else None
        flags[name] = dataclasses.replace(flags[name], default=default, lora_default=lora_default)
    return {name: _with_reason(flag) for name, flag in flags.items()}


def _with_reason(flag: Flag) -> Flag:
    """Let the help of a flag say why it has no effect or is refused."""
    if reason := NO_EFFECT.get(flag.name):
        return dataclasses.replace(flag, help=f"no effect: {reason}")
    if refusal := REFUSED.get(flag.name):
        return dataclasses.replace(flag, help=f"not supported: {refusal.reason}")
    return flag


@cache
def transformers_flags() -> dict[str, Flag]:
    """Return the fields of ``TrainingArguments`` that can be written as text, in its order.

    Raises:
        ConfigError: transformers is not installed.
    """
    spec = importlib.util.find_spec("transformers")  # does not import it
    if spec is None or spec.origin is None:
        raise ConfigError("transformers is not installed", pip_command("requirements_finetune.txt"))
    trees = [
        ast.parse((Path(spec.origin).parent / name).read_text(encoding="utf-8"))
        for name in ("training_args.py", "trainer_utils.py")
    ]
    classes = {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}
    enums = {name: values for name, node in classes.items() if (values := _enum_values(node))}
    declaration = classes["TrainingArguments"]
    constants = _constants(declaration)
    flags = {}
    for node in declaration.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(node.value, ast.Call):
            flag = _read_field(node.target.id, node.annotation, node.value, enums, constants)
            if flag.kinds:
                flags[flag.name] = flag
    return flags


def _read_field(
    name: str, annotation: ast.expr, call: ast.Call, enums: dict[str, tuple[str, ...]], constants: dict[str, Any]
) -> Flag:
    """Build a flag from ``name: annotation = field(default=..., metadata={...})``."""
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    node, metadata = keywords.get("metadata"), dict[str, ast.expr]()
    if isinstance(node, ast.Dict):
        metadata = {key.value: value for key, value in zip(node.keys, node.values, strict=True)
                    if isinstance(key, ast.Constant) and isinstance(key.value, str)}  # fmt: skip
    default = keywords.get("default")
    value = constants.get(default.id) if isinstance(default, ast.Name) else _literal(default)
    if "default_factory" in keywords:
        value = []
    flag = flag_of(name, annotation, value, str(_literal(metadata.get("help")) or ""), enums)
    choices = _LOG_LEVELS if name.startswith("log_level") else tuple(_literal(metadata.get("choices")) or ())
    return dataclasses.replace(
        flag, choices=choices or flag.choices, bare=_literal(metadata.get("const")) or flag.bare
    )  # fmt: skip


def _literal(node: ast.expr | None) -> Any:
    """Return the value of a literal; ``None`` if it is only computed when transformers is imported."""
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return None


def _enum_values(node: ast.ClassDef) -> tuple[str, ...]:
    """Return the values of an enum class; empty for other classes."""
    if not any(isinstance(base, ast.Name) and base.id.endswith("Enum") for base in node.bases):
        return ()
    values = [_literal(item.value) for item in node.body if isinstance(item, ast.Assign)]
    return tuple(value for value in values if isinstance(value, str))


def _constants(node: ast.ClassDef) -> dict[str, Any]:
    """Return the names that a class body assigns for its defaults. The last assignment is for the newest torch."""
    assigned = [item for item in ast.walk(node) if isinstance(item, ast.Assign)]
    return {
        item.targets[0].id: _literal(item.value)
        for item in assigned
        if isinstance(item.targets[0], ast.Name) and isinstance(item.value, ast.Constant)
    }
