"""Qwen v1's config.json as Qwen2's and back, and what of it only one of them can say."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from checkpoints.files import load_json
from checkpoints.model_config import declared_dtype, find_quantization, with_dtype
from errors import ConfigError, one_line
from export.layouts.qwen2_names import Layout, endings_in

logger = logging.getLogger(__name__)

QWEN_CONFIG = "qwen_config"
"""Where a Qwen2 config keeps what only Qwen v1's can say, for the way back."""
_KEPT_KEYS = ("seq_length", "max_position_embeddings", "use_dynamic_ntk", "use_logn_attn", "emb_dropout_prob")

# Keys that both know; Qwen v1 -> Qwen2.
_SAME = {
    "vocab_size": "vocab_size", "hidden_size": "hidden_size", "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads", "layer_norm_epsilon": "rms_norm_eps",
    "initializer_range": "initializer_range", "attn_dropout_prob": "attention_dropout", "use_cache": "use_cache",
    "tie_word_embeddings": "tie_word_embeddings", "bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}  # fmt: skip
_SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings",
)  # fmt: skip
# Lists of modules in a quantization_config, whose entries may be lists again.
_MODULE_LISTS = ("modules_to_not_convert", "modules_in_block_to_quantize")

# What dynamic NTK of transformers' Qwen2 multiplies the base with is v1's factor at 2, 4, 8... times the length.
DYNAMIC_NTK = {"rope_type": "dynamic", "factor": 2.0}


def config_to_qwen2(config: Mapping[str, Any], dynamic_ntk: bool = False) -> dict[str, Any]:
    """The config.json of the same model in Qwen2's layout. What is lost beyond ``seq_length`` is logged.

    Args:
        config: of a Qwen v1 checkpoint, also with the keys of August 2023.
        dynamic_ntk: ask for transformers' dynamic NTK beyond ``seq_length``, v1's nearest kin. Not by default: vLLM and
            SGLang compute one table for all lengths then, so that also short texts are answered otherwise; llama.cpp
            ignores it. Plain rotary embeddings are exact up to ``seq_length`` everywhere.

    Raises:
        ConfigError: a model that Qwen2 cannot express.
    """
    from qwen_model.configuration_qwen import QWenConfig

    given = _parse(QWenConfig, config)
    _check_qwen2_can(given)
    extrapolates = given.use_dynamic_ntk or given.use_logn_attn
    length = given.trained_length() if extrapolates else given.max_position_embeddings
    result: dict[str, Any] = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu"}
    result |= {later: value for name, later in _SAME.items() if (value := getattr(given, name)) is not None}
    result |= {
        "num_key_value_heads": given.num_attention_heads,
        "intermediate_size": given.intermediate_size // 2,
        "max_position_embeddings": length,
        "rope_theta": given.rotary_emb_base,
        "use_sliding_window": False,
        QWEN_CONFIG: {name: getattr(given, name) for name in _KEPT_KEYS},
    }
    if given.use_dynamic_ntk and dynamic_ntk:
        result["rope_scaling"] = dict(DYNAMIC_NTK)
    if extrapolates:
        _say_what_is_lost(given, dynamic_ntk)
    return _with_quantization(config, _with_dtype_of(config, result), "qwen2")


def config_to_qwen(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the same model in Qwen v1's layout.

    Dynamic NTK and log-n attention come back where :func:`config_to_qwen2` kept them, and are off otherwise.

    Raises:
        ConfigError: a model that Qwen v1 cannot express.
    """
    from transformers import Qwen2Config

    given = _parse(Qwen2Config, {name: value for name, value in config.items() if name != QWEN_CONFIG})
    kept = config.get(QWEN_CONFIG) or {}
    _check_qwen_can(config, given, bool(kept.get("use_dynamic_ntk")))
    result: dict[str, Any] = {"architectures": ["QWenLMHeadModel"], "model_type": "qwen"}
    result |= {name: value for name, later in _SAME.items() if (value := getattr(given, later)) is not None}
    result |= {
        "kv_channels": given.hidden_size // given.num_attention_heads,
        "intermediate_size": 2 * given.intermediate_size,
        "rotary_emb_base": given.rope_parameters["rope_theta"],
        "rotary_pct": 1.0,
        "no_bias": True,
        "scale_attn_weights": True,
        "seq_length": given.max_position_embeddings,
        "max_position_embeddings": given.max_position_embeddings,
        "emb_dropout_prob": 0.0,
        "use_dynamic_ntk": False,
        "use_logn_attn": False,
        "tokenizer_class": "QWenTokenizer",
        **{name: kept[name] for name in _KEPT_KEYS if name in kept},
    }
    return _with_quantization(config, _with_dtype_of(config, result), "qwen")


def find_quantization_config(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The ``quantization_config`` of a checkpoint of packed weights, as today's libraries look for it.

    Old checkpoints say it in a file of its own, or do not name their method. ``None`` for any other checkpoint.

    Raises:
        ConfigError: a method, format or number of bits that cannot be read.
    """
    quantization = find_quantization(folder)
    if quantization is None or not quantization.is_packed:
        return config.get("quantization_config")
    given: dict[str, Any] = dict(config.get("quantization_config") or {})
    for name in ("quantize_config.json", "quant_config.json"):
        if not given and (folder / name).is_file():
            given = load_json(folder / name)
            if quantization.method == "awq":
                given = {"version": "gemm", "zero_point": given.get("zero_point", True)}
    said = {"quant_method": quantization.method, "bits": quantization.bits, "group_size": quantization.group_size}
    return given | said


def _parse(kind: Any, config: Mapping[str, Any]) -> Any:
    """A config object of transformers', which knows defaults and the keys of other times."""
    copy_again = "Copy it again from the original checkpoint"
    try:
        given = kind(**{key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")})
    except ConfigError:
        raise
    except (StrictDataclassError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"config.json cannot be understood ({one_line(error)})", copy_again) from error
    for name in _SIZES:
        if not isinstance(size := getattr(given, name), int) or size < 1:
            raise ConfigError(f"config.json: {name} is {size!r}", copy_again)
    return given


def _check_qwen2_can(given: Any) -> None:
    faults = {
        "no_bias false: Qwen2's layers other than q, k and v have no bias": not given.no_bias,
        f"rotary_pct {given.rotary_pct}: Qwen2 rotates whole heads": given.rotary_pct != 1,
        "scale_attn_weights false: Qwen2 scales the attention": not given.scale_attn_weights,
        f"intermediate_size {given.intermediate_size} is odd": given.intermediate_size % 2,
    }
    _check(faults, "Qwen2", "Keep the layout of Qwen v1")


def _check_qwen_can(config: Mapping[str, Any], given: Any, had_dynamic_ntk: bool) -> None:
    head_dim = config.get("head_dim") or given.hidden_size // given.num_attention_heads
    rope = {name: value for name, value in given.rope_parameters.items() if name != "rope_theta"}
    plain_ropes = [{"rope_type": "default"}, *([DYNAMIC_NTK] if had_dynamic_ntk else [])]
    heads = given.num_attention_heads
    faults = {
        f"model_type {config.get('model_type')!r} is not qwen2": config.get("model_type") != "qwen2",
        f"num_key_value_heads {given.num_key_value_heads} is not num_attention_heads {heads}": (
            given.num_key_value_heads != heads
        ),
        f"head_dim {head_dim} x {heads} heads is not hidden_size {given.hidden_size}": (
            head_dim * heads != given.hidden_size
        ),
        f"hidden_act {given.hidden_act!r} is not 'silu'": given.hidden_act != "silu",
        f"rotary embeddings with {rope}": rope not in plain_ropes,
        "some layers attend to a sliding window": set(given.layer_types) - {"full_attention"},
    }
    _check(faults, "Qwen v1", "Keep the layout of Qwen2")


def _check(faults: Mapping[str, Any], layout: str, fix: str) -> None:
    if found := next((what for what, is_fault in faults.items() if is_fault), None):
        raise ConfigError(f"config.json: {found}, which {layout}'s layout cannot express", fix)


def _with_dtype_of(config: Mapping[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """``result`` in the precision that ``config`` declares, under the same keys."""
    dtype = declared_dtype(config)
    keys = {key: dtype for key in ("dtype", "torch_dtype") if config.get(key)}
    return result if dtype is None else with_dtype(result | keys, dtype)


def _say_what_is_lost(given: Any, dynamic_ntk: bool) -> None:
    names = [
        name
        for name, used in (("dynamic NTK", given.use_dynamic_ntk), ("log-n attention", given.use_logn_attn))
        if used and not (name == "dynamic NTK" and dynamic_ntk)
    ]
    if dynamic_ntk and given.use_dynamic_ntk:
        logger.warning(
            "beyond %d tokens transformers' dynamic NTK takes the place of Qwen v1's, whose steps it smooths; vLLM and "
            "SGLang apply it to shorter texts, too",
            given.seq_length,
        )
    hint = f'. For transformers "rope_scaling": {json.dumps(DYNAMIC_NTK)} in config.json comes nearest to it'
    hint = hint if "dynamic NTK" in names else ""
    if names:
        logger.warning(
            "Qwen2 has no %s: the model is the same up to seq_length, %d tokens, which its max_position_embeddings "
            "says now; on longer texts it gets worse than Qwen v1%s",
            " and no ".join(names),
            given.seq_length,
            hint,
        )


def _with_quantization(config: Mapping[str, Any], result: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """Carry a ``quantization_config`` along, its modules under their new names."""
    given = config.get("quantization_config")
    if not given:
        return result
    if given.get("dynamic"):
        what = "config.json: the quantization_config has rules of its own for some modules (dynamic)"
        raise ConfigError(what, "Give --dtype to dequantise the checkpoint")
    # The weights get their usual file name.
    renamed = {name: value for name, value in given.items() if name != "model_file_base_name"}
    renamed |= {name: _renamed(given[name], layout) for name in _MODULE_LISTS if given.get(name)}
    return result | {"quantization_config": renamed}


def _renamed(modules: list[Any], layout: Layout) -> list[Any]:
    found: list[Any] = []
    for module in modules:
        if isinstance(module, list):
            found.append(_renamed(module, layout))
        else:
            found += [name for name in endings_in(layout, module) or (module,) if name not in found]
    return found
