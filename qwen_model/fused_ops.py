"""Operations of a block with their own gradients: they keep what the gradient needs and nothing else.

autograd keeps the inputs of every elementwise operation. Here the norm keeps its input and a number per row, and the
rotation its tables, which all blocks share.

Shapes: B batch, T tokens, H heads, D head size, R rotated channels of a head, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(states: Tensor, weight: Tensor, eps: float, rounds_last: bool = False) -> Tensor:
    """Normalise the last dimension by its root mean square in float32, round to the input's dtype, then scale.

    Args:
        states: [..., C].
        weight: [C]; it gets a gradient if it is trained.
        rounds_last: scale, then round; the weight is float32.
    """
    output: Any
    output, inverse = _RMSNorm.apply(states, weight, eps, rounds_last)
    if output.requires_grad:
        output.norm_input = NormInput(states.detach(), inverse, weight.detach(), rounds_last), output._version
    result: Tensor = output
    return result


@dataclass(frozen=True)
class NormInput:
    """What the output of a norm is computed from: kept by the norm, so that others need not keep the output.

    Attributes:
        states: [..., C].
        inverse: reciprocal of the root mean square, float32 [..., 1].
        weight: [C].
        rounds_last: see ``rms_norm``.
    """

    states: Tensor
    inverse: Tensor
    weight: Tensor
    rounds_last: bool

    def output(self) -> Tensor:
        """Compute the output again; its bits are those of the norm."""
        if self.rounds_last:
            return (self.states * self.inverse).mul_(self.weight).to(self.states.dtype)
        return _scaled((self.states * self.inverse).to(self.states.dtype), self.weight)


def norm_input_of(states: Tensor) -> NormInput | None:
    """What states were computed from, if they are the output of ``rms_norm``, unchanged, and need a gradient."""
    norm_input, version = getattr(states, "norm_input", (None, 0))
    return norm_input if norm_input is not None and version == states._version else None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, eps: float, rounds_last: bool) -> tuple[Tensor, Tensor]:
        inverse = _inverse_root(states, eps)
        ctx.save_for_backward(states, inverse, weight)
        ctx.mark_non_differentiable(inverse)
        return NormInput(states, inverse, weight, rounds_last).output(), inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        states, inverse, weight = ctx.saved_tensors
        # With n = x / rms(x): the gradient of x is (g w - n mean(g w n)) / rms(x), that of w is the sum of g n.
        products = (gradient.float() * states).flatten(0, -2)  # g x
        to_states = to_weight = None
        if ctx.needs_input_grad[0]:
            means = products.mv(weight.to(products.dtype)).view_as(inverse).mul_(inverse.pow(3)).div_(states.shape[-1])
            to_states = _scaled(gradient * inverse, weight).addcmul_(states, means, value=-1).to(states.dtype)
        if ctx.needs_input_grad[1]:
            to_weight = products.T.mv(inverse.flatten()).to(weight.dtype)
        return to_states, to_weight, None, None


def _inverse_root(states: Tensor, eps: float) -> Tensor:
    """Return the reciprocal of the root mean square of the last dimension, float32 [..., 1]."""
    length = torch.linalg.vector_norm(states, dim=-1, keepdim=True, dtype=torch.float32)
    return length.square_().div_(states.shape[-1]).add_(eps).rsqrt_()


def _scaled(states: Tensor, weight: Tensor) -> Tensor:
    """Return ``states * weight``; new states of the product's dtype are overwritten."""
    is_same = torch.promote_types(states.dtype, weight.dtype) == states.dtype
    return states.mul_(weight) if is_same else states * weight


def rotate(states: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    """Rotate the first R channels of queries or keys (half-split layout), in the wider dtype of states and tables.

    Args:
        states: [B, T, H, D].
        cos, sin: [B or 1, T, R]; they get no gradient.
        dtype: that of the result.
    """
    output: Tensor = _Rotation.apply(states, cos.unsqueeze(2), sin.unsqueeze(2), dtype)
    return output


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = states.dtype
        return _rotated(states, cos, sin, is_inverse=False).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(gradient, cos, sin, is_inverse=True).to(ctx.dtype), None, None, None


def _rotated(states: Tensor, cos: Tensor, sin: Tensor, is_inverse: bool) -> Tensor:
    """Return the product of the rotation, or of its transpose, with states; contiguous."""
    size, half = cos.shape[-1], cos.shape[-1] // 2
    dtype = torch.promote_types(states.dtype, cos.dtype)
    rotated = torch.empty(states.shape, dtype=dtype, device=states.device)
    torch.mul(states[..., :size], cos, out=rotated[..., :size])
    first, second = (slice(half), slice(half, size))
    sines = (sin[..., second], sin[..., first]) if is_inverse else (sin[..., first], sin[..., second])
    sign = 1 if is_inverse else -1
    rotated[..., first].addcmul_(states[..., second], sines[0], value=sign)
    rotated[..., second].addcmul_(states[..., first], sines[1], value=-sign)
    rotated[..., size:] = states[..., size:]
    return rotated


def gated(states: Tensor, gate: Tensor) -> Tensor:
    """Return ``states * sigmoid(gate)``, of which only the two are kept."""
    output: Tensor = _Gated.apply(states, gate)
    return output


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(states, gate)
        return states * gate.sigmoid()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        states, gate = ctx.saved_tensors
        opening = gate.sigmoid()
        to_gate = torch.ops.aten.sigmoid_backward(gradient * states, opening)
        return (gradient * opening).to(states.dtype), to_gate.to(gate.dtype)


def gated_norm(states: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension as ``rms_norm`` does, then multiply with ``silu(gate)`` in float32.

    Args:
        states, gate: [..., C].
        weight: [C].
    """
    output: Tensor = _GatedNorm.apply(states, gate, weight, eps)
    return output


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = _inverse_root(states, eps)
        ctx.save_for_backward(states, gate, inverse, weight)
        return (_scaled((states * inverse).to(states.dtype), weight) * F.silu(gate.float())).to(states.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        states, gate, inverse, weight = ctx.saved_tensors
        wide, normalised = gate.float(), states * inverse
        to_scaled = gradient * F.silu(wide)
        to_weight = (to_scaled * normalised).flatten(0, -2).sum(0).to(weight.dtype)
        to_normalised = to_scaled.mul_(weight)
        means = (to_normalised * normalised).mean(-1, keepdim=True)
        to_states = to_normalised.addcmul_(normalised, means, value=-1).mul_(inverse).to(states.dtype)
        to_gate = torch.ops.aten.silu_backward(normalised.mul_(weight).mul_(gradient), wide).to(gate.dtype)
        return to_states, to_gate, to_weight, None
