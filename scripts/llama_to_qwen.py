"""Convert a Llama checkpoint without biases to Qwen2's or Qwen v1's layout: tensors, config and rank file.

Qwen2 is Llama with biases in q, k and v: with zeros there, it computes the same. Qwen v1 is Qwen2 with as many
key-value heads as heads: the heads of a group get equal copies.

Shapes: H hidden size, D size of a head; ``k_proj.weight`` is [heads * D, H] with the copies.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from checkpoints.files import save_text
from errors import ConfigError
from export.layouts.config import config_to_qwen
from export.layouts.qwen2_names import QKV, module_in_qwen
from qwen_model.architectures import EMBEDDING_WEIGHTS, HEAD_WEIGHT
from qwen_model.prompts import SPECIAL_TOKENS

_BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}
_ROWS = 64
"""The rows of an embedding are a multiple of this."""


def config_in_qwen2(llama: Any) -> dict[str, Any]:
    """Return a Qwen2 config.json for transformers' config of a Llama.

    Raises:
        ConfigError: a setting that Qwen2 does not have.
    """
    rope = llama.rope_parameters
    faults = {
        f"hidden_act {llama.hidden_act}": llama.hidden_act != "silu",
        f"rope_type {rope['rope_type']}": rope["rope_type"] != "default",
        "attention_bias": llama.attention_bias,
        "mlp_bias": llama.mlp_bias,
    }
    if fault := next((what for what, is_fault in faults.items() if is_fault), None):
        raise ConfigError(f"the Llama model has {fault}, which Qwen2 cannot express", "Use another model")
    same = (
        "bos_token_id", "eos_token_id", "hidden_act", "hidden_size", "initializer_range", "intermediate_size",
        "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "pad_token_id",
        "tie_word_embeddings", "vocab_size",
    )  # fmt: skip
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        **{key: getattr(llama, key) for key in same},
        "attention_dropout": 0.0,
        "rms_norm_eps": round(llama.rms_norm_eps, 12),  # GGUF stores float32
        "rope_theta": rope["rope_theta"],
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": False,
    }


def tensors_in_qwen2(llama: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a Llama under Qwen2's names, which are the same, with biases of zeros."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in llama.items():
        if name == HEAD_WEIGHT and config["tie_word_embeddings"]:
            continue
        tensors[name] = tensor
        module = name.removesuffix(".weight")
        if module.endswith(QKV):
            tensors[f"{module}.bias"] = torch.zeros(tensor.shape[0], dtype=tensor.dtype)
    return tensors


def to_qwen(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], old_ids: Sequence[int | None]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Convert tensors and config.json from Qwen2's layout to Qwen v1's, with another order of the vocabulary.

    Args:
        old_ids: for each id of the result its id before; ``None`` for a token that the model does not know. Its row is
            zeros, so that its logit is 0, far below those of the tokens that the model writes.
    """
    heads, num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    in_qwen: dict[str, Tensor] = {}
    thirds: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if name in (*EMBEDDING_WEIGHTS, HEAD_WEIGHT):
            tensor = _reordered(tensor, old_ids)
        found = module_in_qwen(module)
        assert found is not None, name
        target, third = f"{found[0]}.{kind}", found[1]
        if third is None:
            in_qwen[target] = tensor
            continue
        thirds.setdefault(target, []).append(tensor if third == 0 else repeat_heads(tensor, num_kv_heads, heads))
        if len(thirds[target]) == len(QKV):
            in_qwen[target] = torch.cat(thirds.pop(target))
    assert not thirds, list(thirds)
    rows = next(tensor.shape[0] for name, tensor in in_qwen.items() if name in EMBEDDING_WEIGHTS)
    ids = {f"{name}_token_id": None for name in ("bos", "eos", "pad")}  # Qwen v1 has them in generation_config.json
    changed = config_to_qwen({**config, **ids, "num_key_value_heads": heads, "vocab_size": rows})
    return in_qwen, {key: value for key, value in changed.items() if key not in ids}


def repeat_heads(tensor: Tensor, num_kv_heads: int, heads: int) -> Tensor:
    """Copy each key or value head for every head of its group: [num_kv_heads * D, ...] -> [heads * D, ...]."""
    by_head = tensor.view(num_kv_heads, -1, *tensor.shape[1:])
    return by_head.repeat_interleave(heads // num_kv_heads, dim=0).reshape(-1, *tensor.shape[1:])


def _reordered(rows: Tensor, old_ids: Sequence[int | None]) -> Tensor:
    result = rows.new_zeros(len(old_ids) + -len(old_ids) % _ROWS, rows.shape[1])
    known = [(new, old) for new, old in enumerate(old_ids) if old is not None]
    result[[new for new, _ in known]] = rows[[old for _, old in known]]
    return result


def save_rank_file(tokenizer: Mapping[str, Any], path: Path) -> list[int | None]:
    """Write a byte-level BPE as a rank file; return the old id of each new one, ranks first, then special tokens.

    The ranks are the 256 bytes, then the tokens in the order of their merges. Special tokens other than the control
    tokens of ChatML become ``<|extra_0|>``, ``<|extra_1|>``, and so on.

    Args:
        tokenizer: content of a ``tokenizer.json``.

    Raises:
        ConfigError: a merge of several pairs into one token, which a rank file cannot express.
    """
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    specials = {each["content"]: int(each["id"]) for each in tokenizer["added_tokens"]}
    letters = sorted(_BYTES, key=lambda letter: (vocabulary.get(letter, len(vocabulary)), letter))
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in tokenizer["model"]["merges"]]
    tokens = [*letters, *("".join(pair) for pair in pairs)]
    if len(set(tokens)) < len(tokens) or {*vocabulary} - {*specials, *tokens}:
        raise ConfigError("the tokenizer has tokens that are not of exactly one merge", "Give --layout qwen2")
    control = SPECIAL_TOKENS[:3]
    others = sorted((token for token in specials if token not in control), key=specials.__getitem__)
    free = len(SPECIAL_TOKENS) - len(control) - len(others)
    if free < 0 or not {*control} <= {*specials}:
        raise ConfigError(f"the tokenizer's special tokens {others[:3]}... do not fit Qwen v1's", "Give --layout qwen2")
    lines = (f"{base64.b64encode(_bytes_of(token)).decode()} {rank}\n" for rank, token in enumerate(tokens))
    save_text("".join(lines), path)
    return [*map(vocabulary.get, tokens), *(specials[token] for token in (*control, *others)), *[None] * free]


def _bytes_of(token: str) -> bytes:
    return bytes(_BYTES[letter] for letter in token)
