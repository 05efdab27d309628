"""config.json of the four published sizes of Qwen v1, which is all that a plan needs of them, and published memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, vocab_size, seq_length, positions, rope base
_SIZES = {
    "1.8B": (2048, 24, 16, 11008, 151936, 8192, 8192, 10_000),
    "7B": (4096, 32, 32, 22016, 151936, 8192, 32768, 10_000),
    "14B": (5120, 40, 40, 27392, 152064, 2048, 8192, 10_000),
    "72B": (8192, 80, 64, 49152, 152064, 32768, 32768, 1_000_000),
}
SIZES = tuple(_SIZES)
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)

# Memory in GB of the original scripts, as published: A100-80G, batch 1, accumulation 8, flash attention 2, bfloat16.
PUBLISHED: dict[str, dict[str, dict[int, float]]] = {
    "1.8B": {"full": {1024: 43.5}, "lora": {1024: 8.4}, "lora_embeddings": {1024: 14.0}, "q_lora": {1024: 6.6}},
    "7B": {
        "full": {256: 139.2, 512: 148.0, 1024: 162.0},
        "lora": dict(zip(LENGTHS, (20.1, 20.4, 21.5, 23.8, 29.7, 36.6), strict=True)),
        "lora_embeddings": dict(zip(LENGTHS, (33.7, 34.1, 35.2, 35.1, 39.2, 48.5), strict=True)),
        "q_lora": dict(zip(LENGTHS, (11.5, 11.5, 12.3, 13.9, 16.9, 23.5), strict=True)),
    },
    "14B": {
        "lora": dict(zip(LENGTHS, (34.6, 35.1, 35.3, 37.4, 42.5, 55.2), strict=True)),
        "lora_embeddings": dict(zip(LENGTHS, (51.2, 51.1, 51.5, 54.1, 56.8, 67.7), strict=True)),
        "q_lora": dict(zip(LENGTHS, (18.7, 18.4, 18.9, 19.9, 23.0, 27.9), strict=True)),
    },
    "72B": {"lora": {1024: 223.0}, "q_lora": {1024: 62.9}},
}
# GPUs of the published figures that are sums over several, all with ZeRO-3.
PUBLISHED_GPUS = {("7B", "full"): 2, ("72B", "lora"): 4}


def write_config(size: str, folder: Path, is_quantized: bool = False) -> None:
    """Write config.json and generation_config.json of a chat model, unquantised or as Int4 (GPTQ, groups of 128)."""
    hidden, layers, heads, width, rows, trained, positions, base = _SIZES[size]
    config: dict[str, Any] = {
        "architectures": ["QWenLMHeadModel"], "model_type": "qwen", "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "intermediate_size": width, "vocab_size": rows, "seq_length": trained,
        "max_position_embeddings": positions, "rotary_emb_base": base, "kv_channels": 128, "rotary_pct": 1.0,
        "layer_norm_epsilon": 1e-6, "no_bias": True, "tie_word_embeddings": False, "attn_dropout_prob": 0.0,
        "emb_dropout_prob": 0.0, "initializer_range": 0.02, "scale_attn_weights": True, "use_cache": True,
        "use_dynamic_ntk": size != "72B", "use_logn_attn": size != "72B", "tokenizer_class": "QWenTokenizer",
        "bf16": not is_quantized, "fp16": is_quantized, "fp32": False,
    }  # fmt: skip
    if is_quantized:
        config["quantization_config"] = {
            "quant_method": "gptq", "bits": 4, "group_size": 128, "damp_percent": 0.01, "desc_act": False, "sym": True,
            "true_sequential": True, "model_file_base_name": "model", "static_groups": False,
        }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "generation_config.json").write_text(json.dumps({"chat_format": "chatml", "eos_token_id": 151643}))
