"""The linear layers of a block and the LoRA adapters on them, as one operation for layers that share their input.

peft computes ``base(x) + up(down(dropout(x))) * scale`` layer by layer, in passes over memory between the products; for
the backward pass autograd keeps an input of each adapter, a floating-point mask of each dropout, and under autocast
copies in two precisions. Here the layers' common input is kept once, and of each adapter one byte per dropped value and
the R values between its two products; what can be computed again is. Whatever is not a frozen or plain linear layer
with a plain adapter (see ``head.base_and_adapter``) is called.

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
from qwen_model.head import Adapter, add_bias, base_and_adapter
from qwen_model.products import add_product, product


def project(hidden: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """Return the outputs of linear layers that share their input.

    Args:
        hidden: [..., C].
        layers: plain, quantised or adapted linear layers of C inputs; any other module is called.
    """
    parts = [_parts_of(layer, hidden) for layer in layers]
    known = [each for each in parts if each is not None]
    if all(each.down is None for each in known):
        return tuple(layer(hidden) for layer in layers)  # without adapters nothing would be saved twice
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


@dataclass(frozen=True)
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
    weight: Tensor | None = None if hasattr(base, "dequantize") else base.weight
    bias: Tensor | None = base.bias
    if bias is not None and len(bias) > base.out_features:  # a packed layer may be padded
        bias = bias[: base.out_features]
    parts = _Parts(base, weight, bias)
    if adapter is not None:
        p = _dropped_share(adapter)
        if p is None or adapter.down.bias is not None:
            return None
        bias, down, up = add_bias(bias, adapter), adapter.down.weight, adapter.up.weight
        parts = _Parts(base, weight, bias, down, up, p, adapter.scale)
    matrices = [matrix for matrix in (weight, parts.down, parts.up) if matrix is not None]
    is_cast = torch.is_autocast_enabled(x.device.type)
    return parts if is_cast or all(matrix.dtype == x.dtype for matrix in matrices) else None


def _dropped_share(adapter: Adapter) -> float | None:
    """Return the probability of dropout; ``None`` if the module has to be called."""
    dropout: Any = adapter.dropout
    if type(dropout) is AdapterDropout:
        p = float(dropout.p) if dropout.training else 0.0
        return p if p < 1 else None
    return 0.0 if type(dropout) is nn.Identity else None


def _compute(layers: Sequence[_Parts], first: Tensor, second: Tensor | None = None) -> tuple[Tensor, ...]:
    tensors = [tensor for layer in layers for tensor in (layer.weight, layer.bias, layer.down, layer.up)]
    outputs: tuple[Tensor, ...] = _Projection.apply(layers, first, second, *tensors)
    return outputs


class _Projection(torch.autograd.Function):
    """Outputs of layers for a common input: ``first``, or ``silu(first) * second``.

    ``tensors`` are weight, bias, down and up of each layer.
    """

    @staticmethod
    def forward(
        ctx: Any, layers: Sequence[_Parts], first: Tensor, second: Tensor | None, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        device = first.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else first.dtype
        first = first.to(dtype) if second is None else first
        x = first if second is None else F.silu(first).mul_(second)
        x = x.to(dtype).reshape(-1, x.shape[-1])
        outputs: list[Tensor] = []
        saved: list[Tensor | None] = [first, second]
        factors: list[float] = []
        for layer, (weight, bias, down, up) in zip(layers, _split(tensors, 4), strict=True):
            dense = layer.base_weight(weight, dtype)
            output = product(x, dense.T, None if bias is None else bias.to(dtype))
            where, inner, factor = None, None, layer.scale
            if down is not None and up is not None:
                dropped = x
                if layer.p:
                    dropped, where, missing = drop(x, layer.p)
                    factor *= missing
                inner = product(dropped, down.to(dtype).T)
                output.addmm_(inner, up.to(dtype).T, alpha=factor)
            outputs.append(output.view(*first.shape[:-1], output.shape[1]))
            saved += [weight, down, up, where, inner]
            factors.append(factor)
        ctx.layers, ctx.factors, ctx.dtype = layers, factors, dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved)
        return tuple(outputs)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        first, second, *saved = ctx.saved_tensors
        _, needs_first, needs_second, *needs = ctx.needs_input_grad
        activated = None if second is None else F.silu(first)
        x = first if activated is None else activated * second
        x = x.to(ctx.dtype).reshape(-1, x.shape[-1])
        to_x = _Sum() if needs_first or needs_second else None
        to_tensors: list[Tensor | None] = []
        layers = zip(ctx.layers, ctx.factors, gradients, _split(saved, 5), _split(needs, 4), strict=True)
        for layer, factor, gradient, parts, needed in layers:
            if gradient is None:
                to_tensors += [None] * 4
            else:
                gradient = gradient.reshape(-1, gradient.shape[-1])
                to_tensors += _backward(layer, factor, gradient, x, parts, needed, to_x)
        to_first, to_second = None, None
        if to_x is not None and to_x.total is not None:
            to_first = to_x.total.view(first.shape)
            if activated is not None:
                to_first = to_first.to(first.dtype)
                to_second = activated.mul_(to_first)
                to_first = torch.ops.aten.silu_backward(to_first.mul_(second), first)
        return None, to_first, to_second, *to_tensors


class _Sum:
    """A sum of products, if possible in one buffer."""

    total: Tensor | None = None

    def add(self, left: Tensor, right: Tensor, where: Tensor | None = None) -> None:
        """Add ``left @ right``, with the values set to zero that dropout set to zero."""
        if where is not None:
            dropped = drop_product(left, right, where)
            self.total = dropped if self.total is None else self.total.add_(dropped)
        else:
            self.total = product(left, right) if self.total is None else add_product(self.total, left, right)


def _backward(
    layer: _Parts,
    factor: float,
    gradient: Tensor,
    x: Tensor,
    saved: Sequence[Tensor | None],
    needed: Sequence[bool],
    to_x: _Sum | None,
) -> list[Tensor | None]:
    """Return the gradients of a layer's tensors, and add to that of its input.

    Args:
        factor: of ``up``'s input as it was saved.
        gradient: that of the output, [N, O].
    """
    weight, down, up, where, inner = saved
    to_weight, to_bias, to_down, to_up = needed
    gradients: list[Tensor | None] = [None] * 4
    if to_weight:
        gradients[0] = product(gradient.T, x)
    if to_bias:
        gradients[1] = gradient.sum(0)
    if down is not None and up is not None and inner is not None:
        if to_up:
            gradients[3] = product(gradient.T, inner).mul_(factor)
        to_inner = product(gradient, up.to(x.dtype)).mul_(layer.scale / (1 - layer.p))
        if to_down:
            gradients[2] = product(to_inner.T, x if where is None else drop_again(x, where))
        if to_x is not None:
            to_x.add(to_inner, down.to(x.dtype), where)
    if to_x is not None:
        to_x.add(gradient, layer.base_weight(weight, x.dtype))
    return gradients


def _split(values: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [values[start : start + size] for start in range(0, len(values), size)]
