"""Leaner ``forward`` methods for the modules of a block and the embedding, with the results of their own classes.

``use_fast_blocks`` gives these modules another class in memory: a subclass of their own, whose ``forward`` calls the
functions of ``adapted_linear.py``, ``fused_ops.py`` and ``summed_gradients.py``. Modules, parameters and calls stay, so
hooks, gradient checkpointing, adapters and copies work as before, and what is saved does not contain it. Each class is
written out, not made by a function, because a pickled model finds its classes by their names.

Shapes: B batch, T tokens, C hidden size, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2MLP, Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3MLP, Qwen3RMSNorm
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    Qwen3_5Attention,
    Qwen3_5GatedDeltaNet,
    Qwen3_5MLP,
    Qwen3_5RMSNorm,
    Qwen3_5RMSNormGated,
)

from qwen_model.adapted_linear import project, project_gated
from qwen_model.delta_net import RowsDeltaNet, compute
from qwen_model.fused_ops import gated, gated_norm, rms_norm, rotate
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
    """The attention since Qwen2: keys and values of their own heads, since Qwen3 normalised queries and keys.

    Attributes:
        is_gated: the projection of the queries also has a gate for each of them, as in Qwen3.5.
    """

    is_gated = False

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
        gate = None
        if self.is_gated:
            query, gate = query.unflatten(-2, (-1, 2)).unbind(-2)
        if hasattr(self, "q_norm"):
            query, key = self.q_norm(query), self.k_norm(key)
        cos, sin = position_embeddings
        dtype = _attended_dtype(query, cos)
        query, key = rotate(query, cos, sin, dtype), rotate(key, cos, sin, dtype)
        dropout = self.attention_dropout if self.training else 0.0
        kwargs["sliding_window"] = getattr(self, "sliding_window", None)
        return _attend(self, query, key, value, attention_mask, self.o_proj, dropout, gate, **kwargs)


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
    gate: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Call the attention of the model's config and the layer after it.

    Args:
        query, key, value: [B, T, heads, D].
        gate: [B, T, heads, D], of what comes from the attention.

    Returns:
        States [B, T, C], and the weights of the attention if it returns any.
    """
    function = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager_attention)
    heads_first = (states.transpose(1, 2) for states in (query, key, value))
    output, weights = function(module, *heads_first, attention_mask, scaling=module.scaling, dropout=dropout, **kwargs)
    if gate is not None:
        output = gated(output, gate)
    (states,) = project(output.flatten(2), (output_layer,))
    return states, weights


def _attended_dtype(query: Tensor, table: Tensor) -> torch.dtype:
    """The dtype of rotated queries and keys: that of the product, or autocast's, to which attention would cast."""
    device = query.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(query.dtype, table.dtype)


class _MLP(nn.Module):
    """The gated MLP since Qwen2."""

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


class FastQwen3_5Attention(_Attention, Qwen3_5Attention):
    is_gated = True


class FastQwen3_5DeltaNet(Qwen3_5GatedDeltaNet):
    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Any = None,
        attention_mask: Tensor | None = None,
        sequence_lengths: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if cache_params is not None:
            own: Any = super().forward
            return own(hidden_states, cache_params, attention_mask, **kwargs)  # type: ignore[no-any-return]
        if attention_mask is not None:
            hidden_states = hidden_states * attention_mask[..., None].to(hidden_states.dtype)
        samples, length = hidden_states.shape[:2]
        return compute(self, project, hidden_states, sequence_lengths or [length] * samples)


class FastQwen3_5MLP(_MLP, Qwen3_5MLP):
    pass


class FastQwen3_5RMSNorm(Qwen3_5RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, 1.0 + self.weight.float(), self.eps, rounds_last=True)


class FastQwen3_5RMSNormGated(Qwen3_5RMSNormGated):
    def forward(self, hidden_states: Tensor, gate: Tensor) -> Tensor:
        return gated_norm(hidden_states, gate, self.weight, self.variance_epsilon)


_FAST_CLASSES: dict[type, type] = {
    nn.Embedding: SummingEmbedding,
    QWenAttention: FastQWenAttention, QWenMLP: FastQWenMLP, QWenRMSNorm: FastQWenRMSNorm,
    Qwen2Attention: FastQwen2Attention, Qwen2MLP: FastQwen2MLP, Qwen2RMSNorm: FastQwen2RMSNorm,
    Qwen3Attention: FastQwen3Attention, Qwen3MLP: FastQwen3MLP, Qwen3RMSNorm: FastQwen3RMSNorm,
    Qwen3_5Attention: FastQwen3_5Attention, Qwen3_5MLP: FastQwen3_5MLP, Qwen3_5RMSNorm: FastQwen3_5RMSNorm,
    Qwen3_5GatedDeltaNet: FastQwen3_5DeltaNet, RowsDeltaNet: FastQwen3_5DeltaNet,
    Qwen3_5RMSNormGated: FastQwen3_5RMSNormGated,
}  # fmt: skip
