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


def project(hidden: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """Return the outputs of linear layers that share their input.

    Args:
        hidden: [..., C].
        layers: plain, quantised or adapted linear layers of C inputs; any other module is called.
    """
    products = [_product_of(layer, hidden) for layer in layers]
    if all(product is None or product.down is None for product in products):
        return tuple(layer(hidden) for layer in layers)  # without adapters nothing would be saved twice
    known = [product for product in products if product is not None]
    if len(known) == len(products):
        return _compute(known, hidden)
    pairs = zip(products, layers, strict=True)
    return tuple(layer(hidden) if product is None else _compute([product], hidden)[0] for product, layer in pairs)


def project_gated(gate: Tensor, up: Tensor, layer: nn.Module) -> Tensor:
    """Return ``layer(silu(gate) * up)``; of the two activations and their product only ``gate`` and ``up`` are kept.

    Args:
        gate, up: [..., C].
        layer: as those of :func:`project`.
    """
    product = _product_of(layer, gate)
    output: Tensor = layer(F.silu(gate) * up) if product is None else _compute([product], gate, up)[0]
    return output


@dataclass(frozen=True)
class _Product:
    """One layer: x W^T + bias, and with an adapter + scale dropout(x) down^T up^T.

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
    down: Tensor | None
    up: Tensor | None
    p: float = 0.0
    scale: float = 1.0

    def base_weight(self, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
        dense: Tensor = self.base.dequantize(dtype) if weight is None else weight.to(dtype)
        return dense


def _product_of(layer: nn.Module, x: Tensor) -> _Product | None:
    """Return the product that a layer computes; ``None`` if it has to be called."""
    parts = base_and_adapter(layer)
    if parts is None:
        return None
    base, adapter = parts
    weight: Tensor | None = None if hasattr(base, "dequantize") else base.weight
    bias: Tensor | None = base.bias
    if bias is not None and len(bias) > base.out_features:  # a packed layer may be padded
        bias = bias[: base.out_features]
    dtypes = {x.dtype if weight is None else weight.dtype}
    product = _Product(base, weight, bias, None, None)
    if adapter is not None:
        if (p := _dropped_share(adapter)) is None:
            return None
        product = _Product(
            base, weight, add_bias(bias, adapter), adapter.down.weight, adapter.up.weight, p, adapter.scale
        )
        dtypes |= {adapter.down.weight.dtype, adapter.up.weight.dtype}
    is_exact = dtypes == {x.dtype} or torch.is_autocast_enabled(x.device.type)
    return product if is_exact and (adapter is None or adapter.down.bias is None) else None


def _dropped_share(adapter: Adapter) -> float | None:
    """Return the probability of dropout; ``None`` if the module has to be called."""
    dropout: Any = adapter.dropout
    if type(dropout) is AdapterDropout:
        p = float(dropout.p) if dropout.training else 0.0
        return p if p < 1 else None
    return 0.0 if type(dropout) is nn.Identity else None


def _compute(products: Sequence[_Product], first: Tensor, second: Tensor | None = None) -> tuple[Tensor, ...]:
    tensors = [tensor for p in products for tensor in (p.weight, p.bias, p.down, p.up)]
    outputs: tuple[Tensor, ...] = _Products.apply(products, first, second, *tensors)
    return outputs


class _Products(torch.autograd.Function):
    """Outputs of layers for a common input: ``first``, or ``silu(first) * second``.

    ``tensors`` are weight, bias, down and up of each layer.
    """

    @staticmethod
    def forward(
        ctx: Any, products: Sequence[_Product], first: Tensor, second: Tensor | None, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        device = first.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else first.dtype
        first = first.to(dtype) if second is None else first
        x = first if second is None else F.silu(first).mul_(second)
        x = x.to(dtype).reshape(-1, x.shape[-1])
        outputs: list[Tensor] = []
        saved: list[Tensor | None] = [first, second]
        factors: list[float] = []
        for product, (weight, bias, down, up) in zip(products, _split(tensors, 4), strict=True):
            dense = product.base_weight(weight, dtype).T
            output = torch.mm(x, dense) if bias is None else torch.addmm(bias.to(dtype), x, dense)
            where = inner = None
            factor = product.scale
            if down is not None and up is not None:
                dropped = x
                if product.p:
                    dropped, where, rest = drop(x, product.p)
                    factor *= rest
                inner = torch.mm(dropped, down.to(dtype).T)
                output.addmm_(inner, up.to(dtype).T, alpha=factor)
            outputs.append(output.view(*first.shape[:-1], output.shape[1]))
            saved += [weight, down, up, where, inner]
            factors.append(factor)
        ctx.products, ctx.factors, ctx.dtype = products, factors, dtype
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
        layers = zip(ctx.products, ctx.factors, gradients, _split(saved, 5), _split(needs, 4), strict=True)
        for product, factor, gradient, parts, needed in layers:
            if gradient is None:
                to_tensors += [None] * 4
            else:
                flat = gradient.reshape(-1, gradient.shape[-1])
                to_tensors += _backward(product, factor, flat, x, parts, needed, to_x)
        to_first, to_second = None, None
        if to_x is not None and to_x.total is not None:
            to_first = to_x.total.view(first.shape)
            if activated is not None:
                to_first = to_first.to(first.dtype)
                to_second = activated.mul_(to_first)
                to_first = torch.ops.aten.silu_backward(to_first.mul_(second), first)
        return None, to_first, to_second, *to_tensors


class _Sum:
    """A sum of products, each added to the same buffer."""

    total: Tensor | None = None

    def add_product(self, left: Tensor, right: Tensor, where: Tensor | None = None) -> None:
        """Add ``left @ right``, with the values set to zero that dropout set to zero."""
        if where is not None:
            dropped = drop_product(left, right, where)
            self.total = dropped if self.total is None else self.total.add_(dropped)
        else:
            self.total = torch.mm(left, right) if self.total is None else self.total.addmm_(left, right)


def _backward(
    product: _Product,
    factor: float,
    gradient: Tensor,
    x: Tensor,
    saved: Sequence[Tensor | None],
    needed: Sequence[bool],
    to_x: _Sum | None,
) -> list[Tensor | None]:
    """Return the gradients of a layer's tensors, and add to that of its input."""
    weight, down, up, where, inner = saved
    to_weight, to_bias, to_down, to_up = needed
    gradients: list[Tensor | None] = [None] * 4
    if to_weight:
        gradients[0] = gradient.T @ x
    if to_bias:
        gradients[1] = gradient.sum(0)
    if down is not None and up is not None and inner is not None:
        if to_up:
            gradients[3] = (gradient.T @ inner).mul_(factor)
        to_inner = (gradient @ up.to(x.dtype)).mul_(product.scale / (1 - product.p))
        if to_down:
            gradients[2] = to_inner.T @ (x if where is None else drop_again(x, where))
        if to_x is not None:
            to_x.add_product(to_inner, down.to(x.dtype), where)
    if to_x is not None:
        to_x.add_product(gradient, product.base_weight(weight, x.dtype))
    return gradients


def _split(values: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [values[start : start + size] for start in range(0, len(values), size)]
