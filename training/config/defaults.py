"""The defaults of a run that differ from transformers': one set for finetune.py, its launchers and the preview.

They are the values of Qwen's original launch scripts, except for the length.
"""

from __future__ import annotations

import textwrap
from typing import Any

# Tokens of a sample; the original's 512 is too short for many conversations.
MODEL_MAX_LENGTH = 2048

_COMMON: dict[str, Any] = {
    "num_train_epochs": 5.0,
    "per_device_eval_batch_size": 1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.01,  # below 1: a fraction of all steps
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "gradient_checkpointing": True,
    "save_steps": 1000,
    "save_total_limit": 10,
    "report_to": "none",
}
_ALL_PARAMETERS = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16, "learning_rate": 1e-5}
_LORA = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "learning_rate": 3e-4}


def training_defaults(use_lora: bool) -> dict[str, Any]:
    """Return the values of transformers' flags that have a default of their own here, for LoRA or all parameters."""
    return _COMMON | (_LORA if use_lora else _ALL_PARAMETERS)


def describe(use_lora: bool) -> str:
    """Return the defaults as flags, for the help of the launchers."""
    values = training_defaults(use_lora) | {"model_max_length": MODEL_MAX_LENGTH}
    texts = {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in values.items()}
    flags = " ".join(f"--{name}\u00a0{text}" for name, text in texts.items())  # no line break before a value
    return textwrap.fill(flags, 118, initial_indent="  ", subsequent_indent="  ").replace("\u00a0", " ")
