"""Blocks of a model that only answers: fewer and larger operations, with the results of the models' own classes.

``use_answer_blocks`` gives norms, attention and MLP another class in memory, as ``fast_blocks.py`` does for training.
Layers with the same input become one. Attention to one query per row treats the heads that share a key as its queries,
so that a key is read once. All roundings to 16 bits stay where they are.

Shapes: B batch, T tokens, C hidden size, H heads of queries, K heads of keys and of values, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2MLP, Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3MLP, Qwen3RMSNorm
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5MLP, Qwen3_5RMSNorm

from qwen_model.head import is_bare
from qwen_model.modeling_qwen import QWenAttention, QWenMLP, QWenRMSNorm, eager_attention
from qwen_model.packed_linear import Packer, is_slow
from qwen_model.rope import RotaryTables


def use_answer_blocks(model: nn.Module) -> None:
    """Let a model compute its blocks by the classes below, and pack its weights where products of 16 bits are slow.

    Modules of classes that are not known stay as they are, as do those with hooks. The model can be neither saved nor
    trained afterwards: layers that are joined or packed have no weights of their own names any more.
    """
    for module in _without_layers(model):
        answering = _ANSWER_CLASSES.get(type(module))
        has_silu = isinstance(getattr(module, "act_fn", None), nn.SiLU | SiLUActivation | None)
        if answering is not None and has_silu and is_bare(module):
            module.__class__ = answering
            _join_layers(module)
    with Packer() as packer:
        for parent in _without_layers(model):
            for name, layer in list(parent.named_children()):
                if type(layer) is nn.Linear and is_slow(layer.weight) and is_bare(layer) and _is_called(parent, name):
                    packer.pack(layer, partial(setattr, parent, name))


def _without_layers(model: nn.Module) -> list[nn.Module]:
    """Return the modules of a model but for its plain linear layers, which a list would keep in memory."""
    return [module for module in model.modules() if type(module) is not nn.Linear]


def _is_called(parent: Any, name: str) -> bool:
    """Return whether a module only calls its layer; peft's wrappers also read weights, but for that of plain LoRA."""
    if hasattr(parent, "lora_A"):
        return name == "base_layer" and not any(parent.use_dora.values())
    return not hasattr(parent, "base_layer") and not isinstance(parent, nn.ModuleDict)


def _join_layers(module: Any) -> None:
    """Replace the layers of a block that have the same input by one, ``module.joined``; ``None`` if they stay."""
    module.joined = None
    layers = [getattr(module, name) for name in module.joined_names]
    if not layers or not all(type(layer) is nn.Linear and is_bare(layer) for layer in layers):
        return
    if len({(layer.weight.dtype, layer.weight.device, layer.bias is None) for layer in layers}) > 1:
        return
    weight = torch.cat([layer.weight for layer in layers])
    joined = nn.Linear(weight.shape[1], weight.shape[0], layers[0].bias is not None, device="meta")
    joined.weight = nn.Parameter(weight, requires_grad=False)
    if joined.bias is not None:
        joined.bias = nn.Parameter(torch.cat([layer.bias for layer in layers]), requires_grad=False)
    module.joined = joined
    for name in module.joined_names:
        delattr(module, name)


def _project(module: Any, states: Tensor) -> Tensor:
    """Return the outputs of the layers ``joined_names`` beside each other."""
    if module.joined is not None:
        joined: Tensor = module.joined(states)
        return joined
    return torch.cat([getattr(module, name)(states) for name in module.joined_names], dim=-1)


def _normalise(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise in float32, round to the dtype of the states, then scale."""
    return weight * F.rms_norm(states, states.shape[-1:], None, eps)


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R channels of states [B, T, heads, D], in the wider dtype of states and tables [B, T, R]."""
    size, half = cos.shape[-1], cos.shape[-1] // 2
    turned = states if size == states.shape[-1] else states[..., :size]
    cosines, sines = turned * cos.unsqueeze(2), turned * sin.unsqueeze(2)
    cosines[..., :half].sub_(sines[..., half:])
    cosines[..., half:].add_(sines[..., :half])
    rotated = cosines.to(states.dtype)
    return rotated if turned is states else torch.cat((rotated, states[..., size:]), dim=-1)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attend to keys and values [B, K, L, D] with queries [B, T, H, D].

    Returns:
        States [B, T, H * D], and the weights of the attention if it returns any.
    """
    batch, length, heads, size = query.shape
    if length == 1 and module.config._attn_implementation == "sdpa":
        grouped = query.view(batch, key.shape[1], heads // key.shape[1], size)
        states = F.scaled_dot_product_attention(grouped, key, value, attention_mask, scale=module.scaling)
        return states.reshape(batch, 1, heads * size), None
    function = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager_attention)
    states, weights = function(
        module, query.transpose(1, 2), key, value, attention_mask, scaling=module.scaling, dropout=0.0, **kwargs
    )
    return states.reshape(batch, length, heads * size), weights


class _Attention(nn.Module):
    """The attention of Qwen2 and Qwen3."""

    joined_names = ("q_proj", "k_proj", "v_proj")

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: RotaryTables,
        attention_mask: Tensor | None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        states = _project(self, hidden_states).unflatten(-1, (-1, self.head_dim))
        keys = states.shape[2] // (self.num_key_value_groups + 2)
        turned = states[:, :, :-keys]
        if hasattr(self, "q_norm"):
            turned = torch.cat((self.q_norm(turned[:, :, :-keys]), self.k_norm(turned[:, :, -keys:])), dim=2)
        turned = _rotate(turned, *position_embeddings)
        key, value = turned[:, :, -keys:].transpose(1, 2), states[:, :, -keys:].transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        kwargs["sliding_window"] = self.sliding_window
        output, weights = _attend(self, turned[:, :, :-keys], key, value, attention_mask, **kwargs)
        return self.o_proj(output), weights


class AnswerQWenAttention(QWenAttention):
    joined_names: Sequence[str] = ()

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        rotary: RotaryTables,
        query_scale: Tensor | None,
        past_key_values: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        states = self.c_attn(hidden_states).unflatten(-1, (-1, self.head_dim))
        turned = _rotate(states[:, :, : -self.num_heads], *rotary)
        query, key = turned[:, :, : self.num_heads], turned[:, :, self.num_heads :].transpose(1, 2)
        value = states[:, :, -self.num_heads :].transpose(1, 2)
        if query_scale is not None:
            query = query * query_scale[:, :, None, None].to(query.dtype)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        output, weights = _attend(self, query, key, value, attention_mask, **kwargs)
        return self.c_proj(output), weights


class _MLP(nn.Module):
    """The gated MLP since Qwen2."""

    joined_names = ("gate_proj", "up_proj")

    def forward(self: Any, x: Tensor) -> Tensor:
        gate, up = _project(self, x).chunk(2, dim=-1)
        output: Tensor = self.down_proj(F.silu(gate) * up)
        return output


class AnswerQWenMLP(QWenMLP):
    joined_names = ("w2", "w1")

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate, up = _project(self, hidden_states).chunk(2, dim=-1)
        output: Tensor = self.c_proj(up * F.silu(gate))
        return output


class _Norm(nn.Module):
    """The norm of Qwen2 and Qwen3."""

    joined_names: Sequence[str] = ()
    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        return _normalise(hidden_states, self.weight, self.variance_epsilon)


class AnswerQWenRMSNorm(QWenRMSNorm):
    joined_names: Sequence[str] = ()

    def forward(self, hidden_states: Tensor) -> Tensor:
        return _normalise(hidden_states, self.weight, self.eps)


class AnswerQwen2Attention(_Attention, Qwen2Attention):
    pass


class AnswerQwen2MLP(_MLP, Qwen2MLP):
    pass


class AnswerQwen2RMSNorm(_Norm, Qwen2RMSNorm):
    pass


class AnswerQwen3Attention(_Attention, Qwen3Attention):
    pass


class AnswerQwen3MLP(_MLP, Qwen3MLP):
    pass


class AnswerQwen3RMSNorm(_Norm, Qwen3RMSNorm):
    pass


class AnswerQwen3_5MLP(_MLP, Qwen3_5MLP):
    pass


class AnswerQwen3_5RMSNorm(Qwen3_5RMSNorm):
    joined_names: Sequence[str] = ()

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], 1.0 + self.weight.float(), self.eps).type_as(x)


_ANSWER_CLASSES: dict[type, type] = {
    QWenAttention: AnswerQWenAttention, QWenMLP: AnswerQWenMLP, QWenRMSNorm: AnswerQWenRMSNorm,
    Qwen2Attention: AnswerQwen2Attention, Qwen2MLP: AnswerQwen2MLP, Qwen2RMSNorm: AnswerQwen2RMSNorm,
    Qwen3Attention: AnswerQwen3Attention, Qwen3MLP: AnswerQwen3MLP, Qwen3RMSNorm: AnswerQwen3RMSNorm,
    Qwen3_5MLP: AnswerQwen3_5MLP, Qwen3_5RMSNorm: AnswerQwen3_5RMSNorm,
}  # fmt: skip
