"""The linear layers of a block and the LoRA adapters on them, as one operation for layers that share their input.

peft computes ``base(x) + up(down(dropout(x))) * scale`` layer by layer, in passes over memory between the products; for
the backward pass autograd keeps an input of each adapter, a floating-point mask of each dropout, and under autocast
copies in two precisions. Here the layers' common input is kept once, where dropout set its values to zero, and of each
adapter the R values between its two products; what can be computed again is. The adapters share one dropout of the
input, so their first matrices are multiplied with it as one. Whatever is not a frozen or plain linear layer with a
plain adapter (see ``head.base_and_adapter``) is called.

Shapes: N tokens, C inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    if len(known) == len(parts) and len({each.p for each in known if each.down is not None}) <= 1:
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
        needs = _split(ctx.needs_input_grad[4:], 4)
        reads_input = second is not None or any(to_weight or to_down for to_weight, _, to_down, _ in needs)
        saved: list[Tensor | None] = [None] * 5
        if reads_input and norm is not None:
            saved[:3] = norm.states, norm.inverse, norm.weight
        elif reads_input:
            saved[3:] = first, second
        parts = _split(tensors, 4)
        downs = [down for _, _, down, _ in parts if down is not None]
        inner, where, ctx.missing = _multiply_firsts(x, downs, [layer.p for layer in layers])
        inners = _by_rank(inner, downs, 1)
        saved += [where, inner]
        outputs: list[Tensor] = []
        for layer, (weight, bias, down, up) in zip(layers, parts, strict=True):
            output = product(x, layer.base_weight(weight, dtype).T, None if bias is None else bias.to(dtype))
            if up is not None:
                output.addmm_(next(inners), up.to(dtype).T, alpha=layer.scale * ctx.missing)
            outputs.append(output.view(*first.shape[:-1], output.shape[1]))
            saved += [weight, down, up]
        ctx.layers, ctx.dtype, ctx.shape, ctx.rounds_last = layers, dtype, first.shape, norm and norm.rounds_last
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved)
        return tuple(outputs)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        states, inverse, norm_weight, first, second, where, inner, *saved = ctx.saved_tensors
        _, _, needs_first, needs_second, *needs = ctx.needs_input_grad
        if states is not None:
            first = NormInput(states, inverse, norm_weight, ctx.rounds_last).output()
        activated = None if second is None else F.silu(first)
        x = first if activated is None else activated * second
        x = None if x is None else x.to(ctx.dtype).reshape(-1, x.shape[-1])
        layers = _with_gradients(ctx, gradients, inner, _split(saved, 3))
        adapters = _AdaptersBackward([each for each in layers if each is not None and each.down is not None], where)
        to_tensors: list[Tensor | None] = []
        for layer, needed in zip(layers, _split(needs, 4), strict=True):
            to_tensors += [None] * 4 if layer is None else layer.to_tensors(x, needed)
        if x is not None and any(needs[2::4]):
            to_downs = adapters.to_downs(x, may_change_x=second is not None)
            to_tensors[2::4] = [None if each is None or each.down is None else next(to_downs) for each in layers]
        del x  # before the largest buffer of the gated product is allocated
        to_x = adapters.to_input() if needs_first or needs_second else None
        for layer in filter(None, layers if needs_first or needs_second else []):
            to_x = _add(to_x, layer.gradient, layer.layer.base_weight(layer.weight, ctx.dtype))
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


def _multiply_firsts(
    x: Tensor, downs: Sequence[Tensor], shares: Sequence[float]
) -> tuple[Tensor | None, Tensor | None, float]:
    """Multiply an input with the first matrices of all adapters on it, after a dropout that they share.

    Returns:
        The products beside each other, [N, sum of the ranks]; where dropout set values to zero; and the factor by which
        the products are to be multiplied.
    """
    if not downs:
        return None, None, 1.0
    where, missing = None, 1.0
    if p := max(shares):
        x, where, missing = drop(x, p)
    return product(x, _join(downs).to(x.dtype).T), where, missing


@dataclass(slots=True)
class _LayerBackward:
    """The backward pass of a layer, from the gradient [N, O] of its output.

    Attributes:
        weight, down, up: what was saved.
        inner: input of ``up``, [N, R], to be multiplied by ``factor``.
    """

    layer: _Parts
    gradient: Tensor
    weight: Tensor | None
    down: Tensor | None
    up: Tensor | None
    inner: Tensor | None
    factor: float

    def to_tensors(self, x: Tensor | None, needed: Sequence[bool]) -> list[Tensor | None]:
        """Return the gradients of weight, bias and up; that of down is computed for all layers."""
        to_weight, to_bias, _, to_up = needed
        return [
            product(self.gradient.T, x) if to_weight and x is not None else None,
            self.gradient.sum(0) if to_bias else None,
            None,
            product(self.gradient.T, self.inner).mul_(self.factor) if to_up and self.inner is not None else None,
        ]

    def to_inner(self) -> Tensor:
        """Return the gradient [N, R] of what ``down`` computes."""
        assert self.up is not None, "the layer has an adapter"
        return product(self.gradient, self.up.to(self.gradient.dtype)).mul_(self.layer.scale / (1 - self.layer.p))


class _AdaptersBackward:
    """The backward pass of the first matrices of adapters, as if they were one.

    Args:
        layers: those with adapters.
        where: their dropout set values of the input to zero.
    """

    def __init__(self, layers: Sequence[_LayerBackward], where: Tensor | None) -> None:
        self.downs, self.where = [each.down for each in layers if each.down is not None], where
        self.to_inner = _join([each.to_inner() for each in layers], 1) if layers else None

    def to_downs(self, x: Tensor, may_change_x: bool) -> Iterator[Tensor]:
        """Yield the gradient of each first matrix."""
        if self.to_inner is None:
            return iter(())
        dropped = x if self.where is None else drop_again(x, self.where, may_change_x)
        return _by_rank(product(self.to_inner.T, dropped).to(self.downs[0].dtype), self.downs, 0)

    def to_input(self) -> Tensor | None:
        """Return their part of the gradient of the input, [N, C]."""
        if self.to_inner is None:
            return None
        down = _join(self.downs).to(self.to_inner.dtype)
        return product(self.to_inner, down) if self.where is None else drop_product(self.to_inner, down, self.where)


def _with_gradients(
    ctx: Any, gradients: Sequence[Tensor | None], inner: Tensor | None, saved: Sequence[Sequence[Any]]
) -> list[_LayerBackward | None]:
    """Return the layers of a projection; ``None`` for those whose output was not used."""
    inners = _by_rank(inner, [down for _, down, _ in saved if down is not None], 1)
    layers: list[_LayerBackward | None] = []
    for layer, gradient, (weight, down, up) in zip(ctx.layers, gradients, saved, strict=True):
        own = None if down is None else next(inners)
        factor = layer.scale * ctx.missing
        flat = None if gradient is None else gradient.reshape(-1, gradient.shape[-1])
        layers.append(None if flat is None else _LayerBackward(layer, flat, weight, down, up, own, factor))
    return layers


def _join(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    return torch.cat(list(parts), dim) if parts[1:] else parts[0]


def _by_rank(joined: Tensor | None, downs: Sequence[Tensor], dim: int) -> Iterator[Tensor]:
    """Iterate over the parts, one for each first matrix, of what was computed from all of them."""
    return iter(() if joined is None else joined.split([down.shape[0] for down in downs], dim))


def _add(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    return product(left, right) if total is None else add_product(total, left, right)


def _split(values: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [values[start : start + size] for start in range(0, len(values), size)]
