"""The shapes that a config.json gives the matrices of a model's blocks; needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def block_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """[O, I] of the linear layers of a block by the end of their names; empty where the config says too little."""
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        width = int(config["intermediate_size"])
        if config["model_type"] == "qwen":
            attention, half = int(config.get("kv_channels", hidden // heads)) * heads, width // 2
            return {
                "attn.c_attn": (3 * attention, hidden), "attn.c_proj": (hidden, attention),
                "mlp.w1": (half, hidden), "mlp.w2": (half, hidden), "mlp.c_proj": (hidden, half),
            }  # fmt: skip
        size = int(config.get("head_dim") or hidden // heads)
        keys = int(config.get("num_key_value_heads") or heads) * size
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return {}
    return {
        "self_attn.q_proj": (heads * size, hidden), "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, heads * size),
        "mlp.gate_proj": (width, hidden), "mlp.up_proj": (width, hidden), "mlp.down_proj": (hidden, width),
    }  # fmt: skip
