"""Leaner ``forward`` methods for embeddings, norms, attention and MLP, with the results of their own classes.

``use_fast_blocks`` gives these modules another class in memory: a subclass of their own, whose ``forward`` calls the
functions of ``adapted_linear.py``, ``fused_ops.py`` and ``summed_gradients.py``. Modules, parameters and calls stay, so
hooks, gradient checkpointing, adapters and copies work as before, and what is saved does not contain it.

Shapes: B batch, T tokens, C hidden size, H heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2MLP, Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3MLP, Qwen3RMSNorm

from qwen_model.adapted_linear import project, project_gated
from qwen_model.fused_ops import rms_norm, rotate
from qwen_model.modeling_qwen import QWenAttention, QWenMLP, QWenRMSNorm, eager_attention
from qwen_model.rope import RotaryTables
from qwen_model.summed_gradients import SummingEmbedding


def use_fast_blocks(model: nn.Module) -> None:
    """Let a model compute its blocks by the methods below; modules of classes that are not known stay as they are."""
    for module in model.modules():
        fast = _FAST_CLASSES.get(type(module))
        if fast is not None and isinstance(getattr(module, "act_fn", None), nn.SiLU | SiLUActivation | None):
            module.__class__ = fast


class _Norm(nn.Module):
    """The norm of Qwen2 and Qwen3."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class _Attention(nn.Module):
    """The attention of Qwen2 and Qwen3: keys and values of their own heads, in Qwen3 normalised queries and keys."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: RotaryTables,
        attention_mask: Tensor | None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if past_key_values is not None:
            own: Any = super().forward
            return own(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)  # type: ignore[no-any-return]
        shape = hidden_states.shape[:-1]
        projected = project(hidden_states, (self.q_proj, self.k_proj, self.v_proj))
        query, key, value = (states.view(*shape, -1, self.head_dim) for states in projected)
        if hasattr(self, "q_norm"):
            query, key = self.q_norm(query), self.k_norm(key)
        cos, sin = position_embeddings
        dtype = _attended_dtype(query, cos)
        query, key = rotate(query, cos, sin, dtype), rotate(key, cos, sin, dtype)
        dropout = self.attention_dropout if self.training else 0.0
        kwargs["sliding_window"] = self.sliding_window
        return _attend(self, query, key, value, attention_mask, self.o_proj, dropout, **kwargs)


class FastQWenAttention(QWenAttention):
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        rotary: RotaryTables,
        query_scale: Tensor | None,
        past_key_values: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if past_key_values is not None:
            return super().forward(hidden_states, attention_mask, rotary, query_scale, past_key_values, **kwargs)
        shape = hidden_states.shape[:-1]
        (stacked,) = project(hidden_states, (self.c_attn,))
        query, key, value = stacked.view(*shape, 3, self.num_heads, self.head_dim).unbind(-3)
        query, key = (rotate(states, *rotary, states.dtype) for states in (query, key))
        value = value.contiguous()  # a view would keep all three for the backward pass
        if query_scale is not None:
            query = query * query_scale[:, :, None, None].to(query.dtype)
        dropout = self.config.attn_dropout_prob if self.training else 0.0
        return _attend(self, query, key, value, attention_mask, self.c_proj, dropout, **kwargs)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    output_layer: nn.Module,
    dropout: float,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Call the attention of the model's config and the layer after it.

    Args:
        query, key, value: [B, T, heads, D].

    Returns:
        States [B, T, C], and the weights of the attention if it returns any.
    """
    function = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager_attention)
    heads_first = (states.transpose(1, 2) for states in (query, key, value))
    output, weights = function(module, *heads_first, attention_mask, scaling=module.scaling, dropout=dropout, **kwargs)
    (states,) = project(output.flatten(2), (output_layer,))
    return states, weights


def _attended_dtype(query: Tensor, table: Tensor) -> torch.dtype:
    """The dtype of rotated queries and keys: that of the product, or autocast's, to which attention would cast."""
    device = query.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(query.dtype, table.dtype)


class _MLP(nn.Module):
    """The gated MLP of Qwen2 and Qwen3."""

    def forward(self: Any, x: Tensor) -> Tensor:
        gate, up = project(x, (self.gate_proj, self.up_proj))
        return project_gated(gate, up, self.down_proj)


class FastQWenMLP(QWenMLP):
    def forward(self, hidden_states: Tensor) -> Tensor:
        up, gate = project(hidden_states, (self.w1, self.w2))
        return project_gated(gate, up, self.c_proj)


class FastQWenRMSNorm(QWenRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight, self.eps)


class FastQwen2Attention(_Attention, Qwen2Attention):
    pass


class FastQwen2MLP(_MLP, Qwen2MLP):
    pass


class FastQwen2RMSNorm(_Norm, Qwen2RMSNorm):
    pass


class FastQwen3Attention(_Attention, Qwen3Attention):
    pass


class FastQwen3MLP(_MLP, Qwen3MLP):
    pass


class FastQwen3RMSNorm(_Norm, Qwen3RMSNorm):
    pass


_FAST_CLASSES: dict[type, type] = {
    nn.Embedding: SummingEmbedding,
    QWenAttention: FastQWenAttention, QWenMLP: FastQWenMLP, QWenRMSNorm: FastQWenRMSNorm,
    Qwen2Attention: FastQwen2Attention, Qwen2MLP: FastQwen2MLP, Qwen2RMSNorm: FastQwen2RMSNorm,
    Qwen3Attention: FastQwen3Attention, Qwen3MLP: FastQwen3MLP, Qwen3RMSNorm: FastQwen3RMSNorm,
}  # fmt: skip
