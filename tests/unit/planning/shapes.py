"""Folders that hold nothing but a config.json, and rehearsals of runs on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from planning.rehearsal import BatchShape, Rehearsal, rehearse
from training.config.parsing import parse_args

SIZES: dict[str, Any] = {
    "vocab_size": 768, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
BLOCK_PARAMETERS = 32 * 32 * 2 + 32 * 16 * 2 + 32 * 64 * 3  # of linear layers
WEIGHTS = 2 * 768 * 32 + 2 * (BLOCK_PARAMETERS + 32 + 16 + 16 + 32 + 32) + 32
"""Weights of a Qwen2 model of these sizes: embedding and head, linear layers with three biases, norms."""


def write_config(folder: Path, model_type: str = "qwen2", **values: Any) -> Path:
    """Write the config.json of a model."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {**SIZES, "model_type": model_type, **values}
    if model_type == "qwen":  # both halves of the gated layer, as its configs have it
        sizes |= {"intermediate_size": 2 * sizes["intermediate_size"], "kv_channels": 8, "seq_length": 512}
    (folder / "config.json").write_text(json.dumps(sizes), encoding="utf-8")
    return folder


def rehearse_flags(
    folder: Path, flags: str, lengths: tuple[int, ...] = (24, 40), device_type: str = "cpu", **values: Any
) -> Rehearsal:
    """Rehearse a run with flags as a user writes them."""
    argv = ["--model_name_or_path", str(folder), *flags.split()]
    return rehearse(
        parse_args(argv), BatchShape(lengths, sum(lengths) - len(lengths)), device_type=device_type, **values
    )
