"""What a config.json says of the precision of its weights, in the words of all times; needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""Qwen v1's flags in a config, which are also what commands call precisions, and torch's names."""


def declared_dtype(config: Mapping[str, Any]) -> str | None:
    """The name of the dtype that a config declares, by torch's name or by a flag; ``None`` where it says nothing."""
    declared = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    if declared in DTYPES.values():
        return declared
    return next((name for flag, name in DTYPES.items() if config.get(flag)), None)


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config that says its floats are in ``dtype``, under the keys that it has."""
    # Older folders say torch_dtype, newer ones dtype.
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    flags = {flag: name == dtype for flag, name in DTYPES.items()} if config.get("model_type") == "qwen" else {}
    return {**config, **dict.fromkeys(keys, dtype), **flags}
