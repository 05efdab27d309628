"""The flags of the installed transformers' TrainingArguments, read from its source.

Importing transformers' trainer takes seconds, reading its source twenty milliseconds: so ``--help`` and a wrong flag
are answered at once.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

from errors import ConfigError
from training.config.flags import Flag, flag_of

# Looked up by transformers without a check, so a wrong one would end in a KeyError.
_LOG_LEVELS = ("debug", "detail", "info", "warning", "error", "critical", "passive")


@cache
def trainer_flags() -> dict[str, Flag]:
    """transformers' flags by the names used here, which are the same for all its versions."""
    flags = dict(transformers_flags())
    # Newer names of what stands below, and another way to save on SIGTERM, which is always done here.
    for name in ("activation_checkpointing", "activation_checkpointing_kwargs", "enable_jit_checkpoint"):
        flags.pop(name, None)
    replaced = {
        "gradient_checkpointing": Flag(
            "gradient_checkpointing", frozenset({"bool"}), False, bare=True,
            help="compute activations again in the backward pass: less memory, slower steps",
        ),
        "gradient_checkpointing_kwargs": Flag(
            "gradient_checkpointing_kwargs", frozenset({"dict"}), None, optional=True,
            help="options of torch.utils.checkpoint",
        ),
        "resume_from_checkpoint": Flag(
            "resume_from_checkpoint", frozenset({"str"}), None, optional=True, bare="True",
            help="continue from a checkpoint-* folder; True: from the newest whole one in --output_dir; auto: from "
            "that, or start where there is none",
        ),
        "debug": Flag(
            "debug", frozenset({"bool", "str"}), False, bare=True, choices=("underflow_overflow", "tpu_metrics_debug"),
            help="show the traceback of a failure; transformers' underflow_overflow can be given too",
        ),
        "fsdp": Flag(
            "fsdp", frozenset({"bool"}), False, bare=True, help="shard the model over all processes with FSDP2"
        ),
        "output_dir": Flag("output_dir", frozenset({"str"}), "trainer_output", help="folder for the result"),
    }  # fmt: skip
    return flags | replaced


@cache
def transformers_flags() -> dict[str, Flag]:
    """Every flag of the installed transformers' TrainingArguments that a text can express, in its order.

    Raises:
        ConfigError: transformers is not installed.
    """
    found = importlib.util.find_spec("transformers")  # does not import it
    if found is None or found.origin is None:
        raise ConfigError("transformers is not installed", "pip install -r requirements_finetune.txt")
    trees = [
        ast.parse((Path(found.origin).parent / name).read_text(encoding="utf-8"))
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
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    metadata = given.get("metadata")
    told: dict[str, ast.expr] = {}
    if isinstance(metadata, ast.Dict):
        told = {key.value: value for key, value in zip(metadata.keys, metadata.values, strict=True)
                if isinstance(key, ast.Constant) and isinstance(key.value, str)}  # fmt: skip
    default = given.get("default")
    value = constants.get(default.id) if isinstance(default, ast.Name) else _literal(default)
    if "default_factory" in given:
        value = []
    flag = flag_of(name, annotation, value, str(_literal(told.get("help")) or ""), enums)
    choices = _LOG_LEVELS if name.startswith("log_level") else tuple(_literal(told.get("choices")) or ())
    return dataclasses.replace(
        flag, choices=choices or flag.choices, bare=_literal(told.get("const")) or flag.bare
    )  # fmt: skip


def _literal(node: ast.expr | None) -> Any:
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return None  # computed when transformers is imported


def _enum_values(node: ast.ClassDef) -> tuple[str, ...]:
    if not any(isinstance(base, ast.Name) and base.id.endswith("Enum") for base in node.bases):
        return ()
    values = [_literal(item.value) for item in node.body if isinstance(item, ast.Assign)]
    return tuple(value for value in values if isinstance(value, str))


def _constants(node: ast.ClassDef) -> dict[str, Any]:
    """Names that a class body sets before its fields; the last value is that of the newest torch."""
    assigned = [item for item in ast.walk(node) if isinstance(item, ast.Assign)]
    return {
        item.targets[0].id: _literal(item.value)
        for item in assigned
        if isinstance(item.targets[0], ast.Name) and isinstance(item.value, ast.Constant)
    }
