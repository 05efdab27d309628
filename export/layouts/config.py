"""Convert Qwen v1's config.json to Qwen2's and back; what the target cannot express is refused, stored or logged."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from checkpoints.files import load_json
from checkpoints.model_config import declared_dtype, find_quantization, with_dtype
from checkpoints.rope import DYNAMIC_NTK
from errors import ConfigError, one_line
from export.layouts.qwen2_names import Layout, convert_suffix

logger = logging.getLogger(__name__)

QWEN_CONFIG = "qwen_config"
"""Key of a Qwen2 config that stores the settings only Qwen v1 has, for converting back."""
_QWEN_ONLY_KEYS = ("seq_length", "max_position_embeddings", "use_dynamic_ntk", "use_logn_attn", "emb_dropout_prob")

# Keys with the same meaning: Qwen v1 -> Qwen2.
_SAME_MEANING = {
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
# Keys of a quantization_config with lists of modules, which may be nested.
_MODULE_LISTS = ("modules_to_not_convert", "modules_in_block_to_quantize")


def config_to_qwen2(config: Mapping[str, Any], dynamic_ntk: bool = False) -> dict[str, Any]:
    """Return the config.json of the same model in Qwen2's layout; log what is lost beyond ``seq_length``.

    Args:
        config: config.json of a Qwen v1 checkpoint; the key names of August 2023 are understood too.
        dynamic_ntk: request transformers' dynamic NTK, the closest to v1's, beyond ``seq_length``. Off by default: vLLM
            and SGLang then use one table for all lengths, which changes the answers to short texts too; llama.cpp
            ignores it. Plain rotary embeddings are exact up to ``seq_length`` everywhere.

    Raises:
        ConfigError: a model that Qwen2 cannot express.
    """
    from qwen_model.configuration_qwen import QWenConfig

    parsed = _parse(QWenConfig, config)
    _check_qwen2_can_express(parsed)
    extrapolates = parsed.use_dynamic_ntk or parsed.use_logn_attn
    length = parsed.trained_length() if extrapolates else parsed.max_position_embeddings
    result: dict[str, Any] = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu"}
    result |= {qwen2: value for qwen, qwen2 in _SAME_MEANING.items() if (value := getattr(parsed, qwen)) is not None}
    result |= {
        "num_key_value_heads": parsed.num_attention_heads,
        "intermediate_size": parsed.intermediate_size // 2,
        "max_position_embeddings": length,
        "rope_theta": parsed.rotary_emb_base,
        "use_sliding_window": False,
        QWEN_CONFIG: {name: getattr(parsed, name) for name in _QWEN_ONLY_KEYS},
    }
    if parsed.use_dynamic_ntk and dynamic_ntk:
        result["rope_scaling"] = dict(DYNAMIC_NTK)
    if extrapolates:
        _log_lost_extrapolation(parsed, dynamic_ntk)
    return _with_quantization(config, _with_dtype_of(config, result), "qwen2")


def config_to_qwen(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of the same model in Qwen v1's layout.

    Dynamic NTK and log-n attention are restored if :func:`config_to_qwen2` stored them, and off otherwise.

    Raises:
        ConfigError: a model that Qwen v1 cannot express.
    """
    from transformers import Qwen2Config

    parsed = _parse(Qwen2Config, {name: value for name, value in config.items() if name != QWEN_CONFIG})
    stored = config.get(QWEN_CONFIG) or {}
    _check_qwen_can_express(config, parsed, bool(stored.get("use_dynamic_ntk")))
    result: dict[str, Any] = {"architectures": ["QWenLMHeadModel"], "model_type": "qwen"}
    result |= {qwen: value for qwen, qwen2 in _SAME_MEANING.items() if (value := getattr(parsed, qwen2)) is not None}
    result |= {
        "kv_channels": parsed.hidden_size // parsed.num_attention_heads,
        "intermediate_size": 2 * parsed.intermediate_size,
        "rotary_emb_base": parsed.rope_parameters["rope_theta"],
        "rotary_pct": 1.0,
        "no_bias": True,
        "scale_attn_weights": True,
        "seq_length": parsed.max_position_embeddings,
        "max_position_embeddings": parsed.max_position_embeddings,
        "emb_dropout_prob": 0.0,
        "use_dynamic_ntk": False,
        "use_logn_attn": False,
        "tokenizer_class": "QWenTokenizer",
        **{name: stored[name] for name in _QWEN_ONLY_KEYS if name in stored},
    }
    return _with_quantization(config, _with_dtype_of(config, result), "qwen")


def find_quantization_config(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a checkpoint's ``quantization_config`` in the form that current libraries expect.

    GPTQ and AWQ checkpoints from before that key existed have a file of their own, or name no method: these are filled
    in. For any other checkpoint it is the config's own, if it has one.

    Raises:
        ConfigError: a method, format or number of bits that cannot be read.
    """
    quantization = find_quantization(folder)
    if quantization is None or not quantization.is_packed:
        return config.get("quantization_config")
    settings: dict[str, Any] = dict(config.get("quantization_config") or {})
    for name in ("quantize_config.json", "quant_config.json"):
        if not settings and (folder / name).is_file():
            settings = load_json(folder / name)
            if quantization.method == "awq":
                settings = {"version": "gemm", "zero_point": settings.get("zero_point", True)}
    return settings | {
        "quant_method": quantization.method,
        "bits": quantization.bits,
        "group_size": quantization.group_size,
    }


def _parse(config_class: Any, config: Mapping[str, Any]) -> Any:
    """Build a config object of transformers, which fills in defaults and translates old key names."""
    copy_again = "Copy it again from the original checkpoint"
    values = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    try:
        parsed = config_class(**values)
    except ConfigError:
        raise
    except (StrictDataclassError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"config.json is not valid ({one_line(error)})", copy_again) from error
    for name in _SIZES:
        if not isinstance(size := getattr(parsed, name), int) or size < 1:
            raise ConfigError(f"config.json: {name} is {size!r}", copy_again)
    return parsed


def _check_qwen2_can_express(config: Any) -> None:
    """Raise ConfigError for settings of a parsed Qwen v1 config that Qwen2 does not have."""
    faults = {
        "no_bias false: Qwen2's layers other than q, k and v have no bias": not config.no_bias,
        f"rotary_pct {config.rotary_pct}: Qwen2 rotates whole heads": config.rotary_pct != 1,
        "scale_attn_weights false: Qwen2 scales the attention": not config.scale_attn_weights,
        f"intermediate_size {config.intermediate_size} is odd": config.intermediate_size % 2,
    }
    _raise_first(faults, "Qwen2", "Keep the layout of Qwen v1")


def _check_qwen_can_express(config: Mapping[str, Any], parsed: Any, had_dynamic_ntk: bool) -> None:
    """Raise ConfigError for settings of a Qwen2 config that Qwen v1 does not have.

    Args:
        parsed: ``config`` as transformers' object.
        had_dynamic_ntk: the model was Qwen v1 with dynamic NTK, so transformers' version of it may be dropped.
    """
    heads = parsed.num_attention_heads
    head_dim = config.get("head_dim") or parsed.hidden_size // heads
    rope = {name: value for name, value in parsed.rope_parameters.items() if name != "rope_theta"}
    known_ropes = [{"rope_type": "default"}, *([DYNAMIC_NTK] if had_dynamic_ntk else [])]
    faults = {
        f"model_type {config.get('model_type')!r} is not qwen2": config.get("model_type") != "qwen2",
        f"num_key_value_heads {parsed.num_key_value_heads} is not num_attention_heads {heads}": (
            parsed.num_key_value_heads != heads
        ),
        f"head_dim {head_dim} x {heads} heads is not hidden_size {parsed.hidden_size}": (
            head_dim * heads != parsed.hidden_size
        ),
        f"hidden_act {parsed.hidden_act!r} is not 'silu'": parsed.hidden_act != "silu",
        f"rotary embeddings with {rope}": rope not in known_ropes,
        "some layers attend to a sliding window": set(parsed.layer_types) - {"full_attention"},
    }
    _raise_first(faults, "Qwen v1", "Keep the layout of Qwen2")


def _raise_first(faults: Mapping[str, Any], layout: str, fix: str) -> None:
    """Raise ConfigError for the first fault, of descriptions and conditions, whose condition is true."""
    if fault := next((what for what, is_fault in faults.items() if is_fault), None):
        raise ConfigError(f"config.json: {fault}, which {layout}'s layout cannot express", fix)


def _with_dtype_of(config: Mapping[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """Return ``result`` with the dtype that ``config`` declares, under the same keys."""
    dtype = declared_dtype(config)
    keys = {key: dtype for key in ("dtype", "torch_dtype") if config.get(key)}
    return result if dtype is None else with_dtype(result | keys, dtype)


def _log_lost_extrapolation(config: Any, dynamic_ntk: bool) -> None:
    """Warn of what a Qwen v1 model computes differently beyond ``seq_length`` in Qwen2's layout.

    Args:
        dynamic_ntk: whether transformers' dynamic NTK was requested in its place.
    """
    if dynamic_ntk and config.use_dynamic_ntk:
        logger.warning(
            "beyond %d tokens transformers' dynamic NTK replaces Qwen v1's, with a smooth factor instead of steps; "
            "vLLM and SGLang apply it to shorter texts too",
            config.seq_length,
        )
    lost = [
        name
        for name, is_lost in (
            ("dynamic NTK", config.use_dynamic_ntk and not dynamic_ntk),
            ("log-n attention", config.use_logn_attn),
        )
        if is_lost
    ]
    if lost:
        hint = f'. In transformers "rope_scaling": {json.dumps(DYNAMIC_NTK)} in config.json comes closest to it'
        logger.warning(
            "Qwen2 has no %s: the model is the same up to seq_length, %d tokens, which is now its "
            "max_position_embeddings; on longer texts it is worse than Qwen v1%s",
            " and no ".join(lost),
            config.seq_length,
            hint if "dynamic NTK" in lost else "",
        )


def _with_quantization(config: Mapping[str, Any], result: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """Return ``result`` with the ``quantization_config`` of ``config``, its modules renamed for ``layout``."""
    settings = config.get("quantization_config")
    if not settings:
        return result
    if settings.get("dynamic"):
        what = "config.json: the quantization_config has its own rules for some modules (dynamic)"
        raise ConfigError(what, "Give --dtype to dequantise the checkpoint")
    # The weights are written under their usual file name.
    renamed = {name: value for name, value in settings.items() if name != "model_file_base_name"}
    renamed |= {name: _rename_modules(settings[name], layout) for name in _MODULE_LISTS if settings.get(name)}
    return result | {"quantization_config": renamed}


def _rename_modules(modules: list[Any], layout: Layout) -> list[Any]:
    renamed: list[Any] = []
    for module in modules:
        if isinstance(module, list):
            renamed.append(_rename_modules(module, layout))
        else:
            renamed += [name for name in convert_suffix(layout, module) or (module,) if name not in renamed]
    return renamed
