"""Table of architectures: one row per supported ``model_type``.

A new ``model_type`` is one row, which names its class in ``lean_models.py``: reuse one, or add one of two lines. If
transformers does not know the type, register its config in ``register.py``, too.
``tests/unit/qwen_model/test_architectures.py`` compares every row with the real class. This file imports only the
standard library, because ``checkpoints`` reads it without transformers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from errors import ConfigError

HEAD = "lm_head"
"""Name of the language-model head in every architecture."""
HEAD_WEIGHT = f"{HEAD}.weight"

Shapes = dict[str, tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Facts about one ``model_type``.

    Attributes:
        display_name: its name in messages.
        saved_class: class name in ``architectures`` of config.json.
        model_class: class in ``lean_models.py`` that the toolkit loads.
        embedding, blocks, norm: modules of the model: token embedding, list of blocks, final norm.
        block_returns_tuple: whether a block returns a tuple that begins with the states.
        linear_groups: all linear layers of a block, in the order of their computation; those of a group have the same
            input. Where blocks differ, a block has some of the groups, see ``groups_of``.
        biased_layers: those of them that have a bias.
        shapes: config.json -> [O, I] of these layers by their names within a block, of blocks of every kind.
        brings_chat_template: whether checkpoints bring a chat template; Qwen v1 has one fixed format instead.
        base_knows_chatml: whether base checkpoints were trained with the ChatML tokens.
        base_system: default system message of checkpoints without a chat template; ``None``: no system message.
    """

    model_type: str
    display_name: str
    saved_class: str
    model_class: str
    embedding: str
    blocks: str
    norm: str
    block_returns_tuple: bool = False
    linear_groups: tuple[tuple[str, ...], ...]
    biased_layers: tuple[str, ...]
    shapes: Callable[[Mapping[str, Any]], Shapes]
    brings_chat_template: bool = True
    base_knows_chatml: bool = True
    base_system: str | None

    @property
    def linear_layers(self) -> tuple[str, ...]:
        """Names within a block of its linear layers, in the order of their computation."""
        return tuple(name for group in self.linear_groups for name in group)

    def groups_of(self, layers: Collection[str]) -> tuple[tuple[str, ...], ...]:
        """The groups of a block that has these linear layers, by their names within it."""
        return tuple(group for group in self.linear_groups if group[0] in layers)

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Default target modules of an adapter: all linear layers of the blocks, by the last part of their names."""
        return tuple(dict.fromkeys(name.rpartition(".")[2] for name in self.linear_layers))

    @property
    def embedding_modules(self) -> tuple[str, str]:
        """Embedding and head, by the last part of their names as peft's configs have them."""
        return self.embedding.rpartition(".")[2], HEAD

    @property
    def embedding_weight(self) -> str:
        """Name of the embedding's tensor on disk."""
        return f"{self.embedding}.weight"


def _qwen_shapes(config: Mapping[str, Any]) -> Shapes:
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    attention = int(config.get("kv_channels", hidden // heads)) * heads
    width = int(config["intermediate_size"]) // 2
    return {
        "attn.c_attn": (3 * attention, hidden), "attn.c_proj": (hidden, attention),
        "mlp.w1": (width, hidden), "mlp.w2": (width, hidden), "mlp.c_proj": (hidden, width),
    }  # fmt: skip


def _qwen2_shapes(config: Mapping[str, Any]) -> Shapes:
    hidden, heads, width = (int(config[name]) for name in ("hidden_size", "num_attention_heads", "intermediate_size"))
    head_size = int(config.get("head_dim") or hidden // heads)
    queries, keys = heads * head_size, int(config.get("num_key_value_heads") or heads) * head_size
    return {
        "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (width, hidden), "mlp.up_proj": (width, hidden), "mlp.down_proj": (hidden, width),
    }  # fmt: skip


def _qwen3_5_shapes(config: Mapping[str, Any]) -> Shapes:
    hidden = int(config["hidden_size"])
    shapes = _qwen2_shapes({"head_dim": 256, **config})
    queries, _ = shapes["self_attn.q_proj"]
    keys, values = (
        int(config[f"linear_num_{kind}_heads"]) * int(config[f"linear_{kind}_head_dim"]) for kind in ("key", "value")
    )
    decays = int(config["linear_num_value_heads"])
    return shapes | {
        "self_attn.q_proj": (2 * queries, hidden),
        "linear_attn.in_proj_qkv": (2 * keys + values, hidden), "linear_attn.in_proj_z": (values, hidden),
        "linear_attn.in_proj_b": (decays, hidden), "linear_attn.in_proj_a": (decays, hidden),
        "linear_attn.out_proj": (hidden, values),
    }  # fmt: skip


_QWEN = Architecture(
    model_type="qwen",
    display_name="Qwen v1",
    saved_class="QWenLMHeadModel",
    model_class="LeanQWenLMHeadModel",
    embedding="transformer.wte",
    blocks="transformer.h",
    norm="transformer.ln_f",
    block_returns_tuple=True,
    linear_groups=(
        ("attn.c_attn",),
        ("attn.c_proj",),
        ("mlp.w1", "mlp.w2"),
        ("mlp.c_proj",),
    ),
    biased_layers=("attn.c_attn",),
    shapes=_qwen_shapes,
    brings_chat_template=False,
    base_knows_chatml=False,
    base_system="You are a helpful assistant.",
)
_QWEN2 = Architecture(
    model_type="qwen2",
    display_name="Qwen2",
    saved_class="Qwen2ForCausalLM",
    model_class="LeanQwen2ForCausalLM",
    embedding="model.embed_tokens",
    blocks="model.layers",
    norm="model.norm",
    linear_groups=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
    biased_layers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    shapes=_qwen2_shapes,
    base_system="You are a helpful assistant.",
)
_QWEN3 = replace(
    _QWEN2,
    model_type="qwen3",
    display_name="Qwen3",
    saved_class="Qwen3ForCausalLM",
    model_class="LeanQwen3ForCausalLM",
    biased_layers=(),
    base_system=None,
)

_QWEN3_5 = replace(
    _QWEN3,
    model_type="qwen3_5_text",
    display_name="Qwen3.5",
    saved_class="Qwen3_5ForCausalLM",
    model_class="LeanQwen3_5ForCausalLM",
    linear_groups=(
        tuple(f"linear_attn.in_proj_{part}" for part in ("qkv", "z", "b", "a")),
        ("linear_attn.out_proj",),
        *_QWEN3.linear_groups,
    ),
    shapes=_qwen3_5_shapes,
)

TEXT_TYPES = {"qwen3_5": "qwen3_5_text"}
"""``model_type`` of a larger model -> that of the text model in it, see ``checkpoints/whole.py``."""

ARCHITECTURES = {row.model_type: row for row in (_QWEN, _QWEN2, _QWEN3, _QWEN3_5)}

EMBEDDING_WEIGHTS = tuple(dict.fromkeys(row.embedding_weight for row in ARCHITECTURES.values()))
"""Names that the embedding's tensor can have on disk; other decoders than Qwen's use the second one as well."""


BIASED_LAYERS = frozenset(name.rpartition(".")[2] for row in ARCHITECTURES.values() for name in row.biased_layers)
"""Last parts of the names of all layers that have a bias in some architecture."""


_OTHER_QWENS = {
    r"qwen\w*_(moe|next)(_text)?": "it is a mixture of experts, and the tensors of experts are not trained here",
    r"qwen\w*_vl(_moe)?(_text)?": "it is made for images, and only models of text are trained here",
    r"qwen\w*_(audio|omni)\w*": "it is made for sound, and only models of text are trained here",
}
"""Values of ``model_type`` of the same family -> why they are not in the table."""

_COMPUTED = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|attn\.(bias|masked_bias))")


def is_computed(name: str) -> bool:
    """Return whether a tensor of an old file is a table (rotary frequencies, causal mask) that every model computes."""
    return _COMPUTED.fullmatch(name) is not None


def architecture_of(model_type: object, file: object = "config.json") -> Architecture:
    """The row of a ``model_type``.

    Args:
        file: where it was read, for the message.

    Raises:
        ConfigError: it is not supported.
    """
    if isinstance(model_type, str) and model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    published = {own: whole for whole, own in TEXT_TYPES.items()}
    *others, last = (published.get(name, name) for name in ARCHITECTURES)
    what = "there is no model_type" if model_type is None else f"model_type {model_type!r} is not supported"
    if reason := next((reason for part, reason in _OTHER_QWENS.items() if re.fullmatch(part, str(model_type))), None):
        fix = "Use a dense text model of Qwen, or train this one with ms-swift"
        raise ConfigError(f"{file}: {what}: {reason}", fix)
    raise ConfigError(
        f"{file}: {what}",
        f"Use a checkpoint of model_type {', '.join(others)} or {last}",
    )


def block_shapes(config: Mapping[str, Any]) -> Shapes:
    """[O, I] of the linear layers of a block by their names within it; empty if the config lacks a size.

    The adapters of any model can be merged: one whose ``model_type`` is not in the table is read as Qwen2, whose names
    most decoders share.
    """
    try:
        return ARCHITECTURES.get(config["model_type"], _QWEN2).shapes(config)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return {}
