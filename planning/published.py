"""config.json of published Qwen models, which is all that a rehearsal needs of them, by their ids on the hubs.

The shapes are those of the config files that were published with the weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

# hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, vocab_size, seq_length, positions, rope base
_QWEN = {
    "1_8B": (2048, 24, 16, 11008, 151936, 8192, 8192, 10_000),
    "7B": (4096, 32, 32, 22016, 151936, 8192, 32768, 10_000),
    "14B": (5120, 40, 40, 27392, 152064, 2048, 8192, 10_000),
    "72B": (8192, 80, 64, 49152, 152064, 32768, 32768, 1_000_000),
}
# hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, intermediate_size, vocab_size, tied
_QWEN2_5 = {
    "0.5B": (896, 24, 14, 2, 4864, 151936, True),
    "1.5B": (1536, 28, 12, 2, 8960, 151936, True),
    "3B": (2048, 36, 16, 2, 11008, 151936, True),
    "7B": (3584, 28, 28, 4, 18944, 152064, False),
    "14B": (5120, 48, 40, 8, 13824, 152064, False),
    "32B": (5120, 64, 40, 8, 27648, 152064, False),
}
_QWEN3 = {
    "0.6B": (1024, 28, 16, 8, 3072, 151936, True),
    "1.7B": (2048, 28, 16, 8, 6144, 151936, True),
    "4B": (2560, 36, 32, 8, 9728, 151936, True),
    "8B": (4096, 36, 32, 8, 12288, 151936, False),
    "14B": (5120, 40, 40, 8, 17408, 151936, False),
    "32B": (5120, 64, 64, 8, 25600, 151936, False),
}
# As above, and linear_num_value_heads.
_QWEN3_5 = {
    "0.8B": (1024, 24, 8, 2, 3584, 248320, True, 16),
    "2B": (2048, 24, 8, 2, 6144, 248320, True, 16),
    "4B": (2560, 32, 16, 4, 9216, 248320, True, 32),
    "9B": (4096, 32, 16, 4, 12288, 248320, False, 32),
    "27B": (5120, 64, 24, 4, 17408, 248320, False, 48),
}
_INT4 = {
    "quant_method": "gptq", "bits": 4, "group_size": 128, "damp_percent": 0.01, "desc_act": False, "sym": True,
    "true_sequential": True, "model_file_base_name": "model", "static_groups": False,
}  # fmt: skip


def published_config(name: str) -> dict[str, Any] | None:
    """Return config.json of a model by its id on the hubs, such as ``Qwen/Qwen-7B-Chat-Int4``; ``None`` if unknown."""
    for pattern, sizes, make in _SERIES:
        if (match := re.fullmatch(pattern, name)) and match["size"] in sizes:
            return make(match["size"], name)
    return None


def write_published_config(name: str, folder: Path) -> Path:
    """Write config.json and generation_config.json of a published model; return the folder."""
    config = published_config(name)
    assert config is not None, name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    chat_format = "chatml" if re.search("Chat|Instruct", name) or config["model_type"] != "qwen" else "raw"
    (folder / "generation_config.json").write_text(json.dumps({"chat_format": chat_format, "eos_token_id": 151643}))
    return folder


def _qwen(size: str, name: str) -> dict[str, Any]:
    hidden, layers, heads, width, rows, trained, positions, base = _QWEN[size]
    is_quantized = name.endswith("-Int4")
    config: dict[str, Any] = {
        "architectures": ["QWenLMHeadModel"], "model_type": "qwen", "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "intermediate_size": width, "vocab_size": rows, "seq_length": trained,
        "max_position_embeddings": positions, "rotary_emb_base": base, "kv_channels": 128, "rotary_pct": 1.0,
        "layer_norm_epsilon": 1e-6, "no_bias": True, "tie_word_embeddings": False, "attn_dropout_prob": 0.0,
        "emb_dropout_prob": 0.0, "initializer_range": 0.02, "scale_attn_weights": True, "use_cache": True,
        "use_dynamic_ntk": size != "72B", "use_logn_attn": size != "72B", "tokenizer_class": "QWenTokenizer",
        "bf16": not is_quantized, "fp16": is_quantized, "fp32": False,
    }  # fmt: skip
    return config | ({"quantization_config": dict(_INT4)} if is_quantized else {})


def _dense(hidden: int, layers: int, heads: int, groups: int, width: int, rows: int, tied: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": rows,
        "num_key_value_heads": groups, "intermediate_size": width, "tie_word_embeddings": bool(tied),
        "dtype": "bfloat16", "rms_norm_eps": 1e-6, "hidden_act": "silu", "use_cache": True,
    }  # fmt: skip


def _qwen2_5(size: str, name: str) -> dict[str, Any]:
    more = {"max_position_embeddings": 32768, "rope_theta": 1e6, "use_sliding_window": False}
    return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **_dense(*_QWEN2_5[size]), **more}


def _qwen3(size: str, name: str) -> dict[str, Any]:
    more = {"max_position_embeddings": 40960, "rope_theta": 1e6, "head_dim": 128, "attention_bias": False}
    return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **_dense(*_QWEN3[size]), **more}


def _qwen3_5(size: str, name: str) -> dict[str, Any]:
    """The text model; the vision tower is neither loaded nor trained."""
    from transformers import Qwen3_5TextConfig

    *dense, value_heads = _QWEN3_5[size]
    layers: int = dense[1]
    more = {
        "head_dim": 256, "max_position_embeddings": 262144, "linear_num_key_heads": 16, "linear_key_head_dim": 128,
        "linear_num_value_heads": value_heads, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * (layers // 4),
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
    }  # fmt: skip
    return {
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": Qwen3_5TextConfig.model_type,
        **_dense(*dense),
        **more,
    }


_Series = tuple[str, dict[str, Any], Callable[[str, str], dict[str, Any]]]
_SERIES: tuple[_Series, ...] = (
    (r"Qwen/Qwen-(?P<size>1_8B|7B|14B|72B)(-Chat)?(-Int4)?", _QWEN, _qwen),
    (r"Qwen/Qwen2\.5-(?P<size>[\d.]+B)(-Instruct)?", _QWEN2_5, _qwen2_5),
    (r"Qwen/Qwen3-(?P<size>[\d.]+B)(-Base)?", _QWEN3, _qwen3),
    (r"Qwen/Qwen3\.5-(?P<size>[\d.]+B)(-Base)?", _QWEN3_5, _qwen3_5),
)
