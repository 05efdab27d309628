"""The gated delta nets of Qwen3.5 on rows of several samples: neither state nor convolution reaches the next sample.

A delta net projects its input to queries, keys and values, convolves these over the last few tokens, applies the delta
rule (``delta_rule.py``), and normalises and gates the result. transformers' class computes batches of one sample per
row and generation; this file what training needs beside it.

Shapes: B batch, T tokens, N tokens of all rows, C channels, W taps, H heads of values, E size of a value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

from qwen_model.delta_rule import gated_delta_rule

KERNELS = "flash-linear-attention"
"""Package whose kernels compute the delta rule on a GPU."""

Project = Callable[[Tensor, Sequence[nn.Module]], Sequence[Tensor]]


class RowsDeltaNet(Qwen3_5GatedDeltaNet):
    """transformers' class, which also takes rows of samples."""

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Any = None,
        attention_mask: Tensor | None = None,
        sequence_lengths: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if sequence_lengths is None:
            own: Any = super().forward
            return own(hidden_states, cache_params, attention_mask, **kwargs)  # type: ignore[no-any-return]
        return compute(self, _call_each, hidden_states, sequence_lengths)


def take_rows(model: nn.Module) -> None:
    """Make the delta nets of a model take rows of several samples, beside what they take already."""
    for module in model.modules():
        if type(module) is Qwen3_5GatedDeltaNet:
            module.__class__ = RowsDeltaNet


def takes_rows(model: nn.Module) -> bool:
    """Return whether no delta net of a model would mix the samples of a row."""
    return all(type(module) is not Qwen3_5GatedDeltaNet for module in model.modules())


def describe(model: nn.Module) -> str:
    """Describe what computes the delta nets of a model; empty if it has none."""
    nets = [module for module in model.modules() if isinstance(module, Qwen3_5GatedDeltaNet)]
    if not nets:
        return ""
    if any(type(net) is Qwen3_5GatedDeltaNet for net in nets):
        return "transformers' implementation"
    if nets[0].A_log.is_cuda and _kernel() is not None:
        return f"kernels of {KERNELS}"
    return "this toolkit's implementation in torch"


def _call_each(hidden: Tensor, layers: Sequence[nn.Module]) -> Sequence[Tensor]:
    return [layer(hidden) for layer in layers]


def compute(module: Any, project: Project, hidden: Tensor, lengths: Sequence[int]) -> Tensor:
    """Compute a delta net on samples that follow one another.

    Args:
        module: of transformers' class.
        project: computes the outputs of layers with a common input.
        hidden: [B, T, C].
        lengths: of the samples, whose sum is B * T.
    """
    layers = (module.in_proj_qkv, module.in_proj_z, module.in_proj_b, module.in_proj_a)
    mixed, gate, strength, decay = (states.flatten(0, 1) for states in project(hidden, layers))
    if type(module.conv1d) is not nn.Conv1d:
        raise ValueError(f"the convolution of a delta net has become a {type(module.conv1d).__name__}")
    mixed = _convolved(mixed, module.conv1d.weight, lengths)
    query, key, value = mixed.split([module.key_dim, module.key_dim, module.value_dim], dim=-1)
    query, key = (states.unflatten(-1, (-1, module.head_k_dim)) for states in (query, key))
    value, gate = (states.unflatten(-1, (-1, module.head_v_dim)) for states in (value, gate))
    log_decay = -module.A_log.float().exp() * F.softplus(decay.float() + module.dt_bias)
    rule = _kernel() if hidden.is_cuda else None
    values = (rule or gated_delta_rule)(query, key, value, log_decay, strength.sigmoid(), lengths)
    # The norm takes rows of one head each.
    states = module.norm(values.flatten(0, 1), gate.flatten(0, 1)).view(*hidden.shape[:-1], -1)
    (output,) = project(states, (module.out_proj,))
    return output


@cache
def _kernel() -> Callable[..., Tensor] | None:
    """Return the delta rule of flash-linear-attention; ``None`` if it is not installed."""
    try:
        compute = import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    except (ImportError, AttributeError):
        return None

    def rule(
        query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, strength: Tensor, lengths: Sequence[int]
    ) -> Tensor:
        starts = torch.tensor([0, *lengths], device=query.device).cumsum(0)
        shared = value.shape[1] // query.shape[1]
        query, key = (states.repeat_interleave(shared, dim=1) for states in (query, key))
        inputs = (states[None].contiguous() for states in (query, key, value))
        output, _ = compute(
            *inputs, g=log_decay[None], beta=strength[None], use_qk_l2norm_in_kernel=True, cu_seqlens=starts
        )
        result: Tensor = output[0]
        return result

    return rule


def _convolved(states: Tensor, weight: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return the causal convolution of each channel within each sample, after SiLU.

    Args:
        states: [N, C].
        weight: [C, 1, W], of ``nn.Conv1d``.
    """
    output: Tensor = _CausalConvolution.apply(states, weight, tuple(lengths))
    return output


class _CausalConvolution(torch.autograd.Function):
    """Sums of products with shifted states: it keeps its input, and writes no sample's states to another."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, lengths: Sequence[int]) -> Tensor:
        ctx.save_for_backward(states, weight)
        ctx.lengths = lengths
        return F.silu(_sums(_wide(states), _taps(weight), lengths), inplace=True).to(states.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        saved, weight = ctx.saved_tensors
        states, taps = _wide(saved), _taps(weight)
        to_sums = torch.ops.aten.silu_backward(gradient.to(states.dtype), _sums(states, taps, ctx.lengths))
        to_states = to_weight = None
        if ctx.needs_input_grad[0]:
            to_states = to_sums * taps[0]
            for tap, early, late in _shifts(len(taps), ctx.lengths):
                to_states[early].addcmul_(to_sums[late], taps[tap])
            to_states = to_states.to(saved.dtype)
        if ctx.needs_input_grad[1]:
            to_taps = torch.zeros_like(taps)
            to_taps[0] = (to_sums * states).sum(0)
            for tap, early, late in _shifts(len(taps), ctx.lengths):
                to_taps[tap] += (to_sums[late] * states[early]).sum(0)
            to_weight = to_taps.flip(0).T.unsqueeze(1).to(weight.dtype)
        return to_states, to_weight, None


def _sums(states: Tensor, taps: Tensor, lengths: Sequence[int]) -> Tensor:
    sums = states * taps[0]
    for tap, early, late in _shifts(len(taps), lengths):
        sums[late].addcmul_(states[early], taps[tap])
    return sums


def _shifts(taps: int, lengths: Sequence[int]) -> list[tuple[int, slice, slice]]:
    """Return the tokens of each sample that have one so many places before them, with that one."""
    shifts, start = [], 0
    for length in lengths:
        end = start + length
        shifts += [(tap, slice(start, end - tap), slice(start + tap, end)) for tap in range(1, min(taps, length))]
        start = end
    return shifts


def _wide(states: Tensor) -> Tensor:
    return states.to(torch.promote_types(states.dtype, torch.float32))


def _taps(weight: Tensor) -> Tensor:
    """Return the weights [W, C] of a token itself, of the one before it and so on."""
    return _wide(weight[:, 0].T.flip(0).contiguous())
