"""The linear layers of a block and the LoRA adapters on them, as one operation for layers that share their input.

peft computes ``base(x) + up(down(dropout(x))) * scale`` layer by layer, in passes over memory between the products; for
the backward pass autograd keeps an input of each adapter, a floating-point mask of each dropout, and under autocast
copies in two precisions. Here the layers' common input is kept once, and of each adapter where dropout set values to
zero and the R values between its two products; what can be computed again is. Whatever is not a frozen or plain linear
layer with a plain adapter (see ``head.base_and_adapter``) is called.

Shapes: N tokens, C inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qwen_model.adapter_dropout import AdapterDropout, drop, drop_again, drop_product
from qwen_model.fused_ops import NormInput, norm_input_of
from qwen_model.head import Adapter, add_bias, base_and_adapter, bias_of
from qwen_model.products import add_product, product


def project(hidden: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """Return the outputs of linear layers that share their input.

    Args:
        hidden: [..., C].
        layers: plain, quantised or adapted linear layers of C inputs; any other module is called.
    """
    parts = [_parts_of(layer, hidden) for layer in layers]
    known = [each for each in parts if each is not None]
    if len(known) == len(parts):
        return _compute(known, hidden)
    pairs = zip(parts, layers, strict=True)
    return tuple(layer(hidden) if each is None else _compute([each], hidden)[0] for each, layer in pairs)


def project_gated(gate: Tensor, up: Tensor, layer: nn.Module) -> Tensor:
    """Return ``layer(silu(gate) * up)``; of the two activations and their product only ``gate`` and ``up`` are kept.

    Args:
        gate, up: [..., C].
        layer: as those of :func:`project`.
    """
    parts = _parts_of(layer, gate)
    output: Tensor = layer(F.silu(gate) * up) if parts is None else _compute([parts], gate, up)[0]
    return output


@dataclass(slots=True)
class _Parts:
    """What a layer computes: x W^T + bias, and with an adapter + scale dropout(x) down^T up^T.

    Attributes:
        base: the layer without its adapter.
        weight: [O, C]; ``None`` if the base computes it for each product, in ``dequantize``.
        bias: [O].
        down, up: [R, C] and [O, R].
        p: probability that dropout sets a value to zero.
    """

    base: Any
    weight: Tensor | None
    bias: Tensor | None
    down: Tensor | None = None
    up: Tensor | None = None
    p: float = 0.0
    scale: float = 1.0

    def base_weight(self, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
        dense: Tensor = self.base.dequantize(dtype) if weight is None else weight.to(dtype)
        return dense


def _parts_of(layer: nn.Module, x: Tensor) -> _Parts | None:
    """Return what a layer computes; ``None`` if it has to be called."""
    found = base_and_adapter(layer)
    if found is None:
        return None
    base, adapter = found
    weight: Tensor | None = None if hasattr(type(base), "dequantize") else base.weight
    bias = bias_of(base)
    parts = _Parts(base, weight, bias)
    if adapter is not None:
        p = _dropped_share(adapter)
        if p is None or adapter.down.bias is not None:
            return None
        parts.bias, parts.p, parts.scale = add_bias(bias, adapter), p, adapter.scale
        parts.down, parts.up = adapter.down.weight, adapter.up.weight
    if torch.is_autocast_enabled(x.device.type):
        return parts
    dtypes = {matrix.dtype for matrix in (weight, parts.down, parts.up) if matrix is not None}
    return parts if dtypes <= {x.dtype} else None


def _dropped_share(adapter: Adapter) -> float | None:
    """Return the probability of dropout; ``None`` if the module has to be called."""
    dropout: Any = adapter.dropout
    if type(dropout) is AdapterDropout:
        p = float(dropout.p) if dropout.training else 0.0
        return p if p < 1 else None
    return 0.0 if type(dropout) is nn.Identity else None


def _compute(layers: Sequence[_Parts], first: Tensor, second: Tensor | None = None) -> tuple[Tensor, ...]:
    tensors = [tensor for layer in layers for tensor in (layer.weight, layer.bias, layer.down, layer.up)]
    outputs: tuple[Tensor, ...] = _Projection.apply(layers, norm_input_of(first), first, second, *tensors)
    return outputs


class _Projection(torch.autograd.Function):
    """Outputs of layers for a common input: ``first``, or ``silu(first) * second``.

    ``tensors`` are weight, bias, down and up of each layer. Where ``first`` is the output of a norm, the norm's input
    is kept in its place, which the norm keeps as well.
    """

    @staticmethod
    def forward(
        ctx: Any,
        layers: Sequence[_Parts],
        norm: NormInput | None,
        first: Tensor,
        second: Tensor | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        device = first.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else first.dtype
        first = first.to(dtype) if second is None else first
        x = first if second is None else F.silu(first).mul_(second)
        x = x.to(dtype).reshape(-1, x.shape[-1])
        outputs: list[Tensor] = []
        needs = _split(ctx.needs_input_grad[4:], 4)
        reads_input = second is not None or any(to_weight or to_down for to_weight, _, to_down, _ in needs)
        saved: list[Tensor | None] = [None] * 5
        if reads_input and norm is not None:
            saved[:3] = norm.states, norm.inverse, norm.weight
        elif reads_input:
            saved[3:] = first, second
        ctx.layers, ctx.factors, ctx.dtype, ctx.shape = layers, [], dtype, first.shape
        for layer, (weight, bias, down, up) in zip(layers, _split(tensors, 4), strict=True):
            output = product(x, layer.base_weight(weight, dtype).T, None if bias is None else bias.to(dtype))
            where, inner, factor = _add_adapter(output, x, layer, down, up)
            outputs.append(output.view(*first.shape[:-1], output.shape[1]))
            saved += [weight, down, up, where, inner]
            ctx.factors.append(factor)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved)
        return tuple(outputs)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        states, inverse, norm_weight, first, second, *saved = ctx.saved_tensors
        _, _, needs_first, needs_second, *needs = ctx.needs_input_grad
        if states is not None:
            first = NormInput(states, inverse, norm_weight).output()
        activated = None if second is None else F.silu(first)
        x = first if activated is None else activated * second
        x = None if x is None else x.to(ctx.dtype).reshape(-1, x.shape[-1])
        to_tensors: list[Tensor | None] = []
        layers = [
            _LayerBackward(layer, factor, gradient.reshape(-1, gradient.shape[-1]), *parts)
            if gradient is not None else None
            for layer, factor, gradient, parts in zip(
                ctx.layers, ctx.factors, gradients, _split(saved, 5), strict=True
            )
        ]  # fmt: skip
        for layer, needed in zip(layers, _split(needs, 4), strict=True):
            to_tensors += [None] * 4 if layer is None else layer.to_tensors(x, needed, second is not None)
        del x  # before the largest buffer of the gated product is allocated
        to_x = None
        for layer in filter(None, layers if needs_first or needs_second else []):
            to_x = layer.add_to_input(to_x)
        if to_x is None:
            return None, None, None, None, *to_tensors
        to_first = to_x.view(ctx.shape)
        if activated is None:
            return None, None, to_first, None, *to_tensors
        to_first = to_first.to(first.dtype)
        to_second = activated.mul_(to_first)
        to_first.mul_(second)
        torch.ops.aten.silu_backward.grad_input(to_first, first, grad_input=to_first)
        return None, None, to_first, to_second, *to_tensors


def _add_adapter(
    output: Tensor, x: Tensor, layer: _Parts, down: Tensor | None, up: Tensor | None
) -> tuple[Tensor | None, Tensor | None, float]:
    """Add what an adapter computes to the output of its layer.

    Returns:
        Where dropout set values to zero, the input [N, R] of ``up``, and the factor by which that is to be multiplied.
    """
    if down is None or up is None:
        return None, None, 1.0
    where, factor = None, layer.scale
    if layer.p:
        x, where, missing = drop(x, layer.p)
        factor *= missing
    inner = product(x, down.to(x.dtype).T)
    output.addmm_(inner, up.to(x.dtype).T, alpha=factor)
    return where, inner, factor


@dataclass(slots=True)
class _LayerBackward:
    """The backward pass of a layer, from the gradient [N, O] of its output.

    Attributes:
        weight, down, up, where, inner: what was saved.
        factor: that of ``inner``.
        to_inner: gradient of what ``down`` computes.
    """

    layer: _Parts
    factor: float
    gradient: Tensor
    weight: Tensor | None
    down: Tensor | None
    up: Tensor | None
    where: Tensor | None
    inner: Tensor | None
    to_inner: Tensor | None = None

    def to_tensors(self, x: Tensor | None, needed: Sequence[bool], may_change_x: bool) -> list[Tensor | None]:
        """Return the gradients of weight, bias, down and up."""
        to_weight, to_bias, to_down, to_up = needed
        gradients: list[Tensor | None] = [None] * 4
        if to_weight and x is not None:
            gradients[0] = product(self.gradient.T, x)
        if to_bias:
            gradients[1] = self.gradient.sum(0)
        if self.up is not None:
            self.to_inner = product(self.gradient, self.up.to(self.gradient.dtype))
            self.to_inner.mul_(self.layer.scale / (1 - self.layer.p))
        if to_up and self.inner is not None:
            gradients[3] = product(self.gradient.T, self.inner).mul_(self.factor)
        if to_down and self.to_inner is not None and x is not None:
            dropped = x if self.where is None else drop_again(x, self.where, may_change_x)
            gradients[2] = product(self.to_inner.T, dropped)
        return gradients

    def add_to_input(self, total: Tensor | None) -> Tensor:
        """Add the gradient of the input to a sum, in its buffer where possible."""
        dtype = self.gradient.dtype
        if self.down is not None and self.to_inner is not None:
            if self.where is not None:
                dropped = drop_product(self.to_inner, self.down.to(dtype), self.where)
                total = dropped if total is None else total.add_(dropped)
            else:
                total = _add(total, self.to_inner, self.down.to(dtype))
        return _add(total, self.gradient, self.layer.base_weight(self.weight, dtype))


def _add(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    return product(left, right) if total is None else add_product(total, left, right)


def _split(values: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [values[start : start + size] for start in range(0, len(values), size)]
