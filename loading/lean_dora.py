"""DoRA without a copy of each weight in every step.

A layer computes m / n (x W^T + s d(x) (B A)^T) with the trained norms m and n = norms of the rows of W + s B A. peft
builds that sum, and B A by a product with an identity matrix, in every forward pass. Here the norms come from

    n^2 = |W|^2 + 2 s (W A^T . B) + s^2 (B A A^T . B)    row by row

where W A^T is the layer's own product with the rows of A: R more tokens. So a quantised layer is never dequantised. As
in peft, n has no gradient. Dropout acts on the adapter's input alone, as without DoRA; peft also computes W d(x).

Only the forward pass changes; parameters and files stay peft's, which other tools read.

Shapes: R rank, I inputs, O outputs, N tokens; A [R, I], B [O, R], m and n [O].
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from qwen_model.head import bias_of

_NORMS = "norms_of_base"


class LeanDora(DoraLinearVariant):
    """peft's hook for the forward pass of a linear layer."""

    takes_any_dtype = True  # see adapters.keep_input_dtype

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        dropped = module.lora_dropout[active_adapter](x)
        change = module.lora_B[active_adapter](module.lora_A[active_adapter](dropped))
        factor = module.lora_magnitude_vector[active_adapter].weight / norms_of_sum(module, active_adapter)
        bias = bias_of(module.get_base_layer())
        plain = result if bias is None else result - bias
        scaled = factor * (plain + change * module.scaling[active_adapter])
        return scaled if bias is None else scaled + bias


@torch.no_grad()
def norms_of_sum(layer: Any, name: str) -> Tensor:
    """Return n [O] in float32."""
    base, scale = layer.get_base_layer(), layer.scaling[name]
    first, second = layer.lora_A[name].weight, layer.lora_B[name].weight.float()
    product = base(first if _is_quantised(base) else first.to(base.weight.dtype))
    if (bias := bias_of(base)) is not None:
        product = product - bias
    first = first.float()
    squares = getattr(layer, _NORMS).square() + 2 * scale * (product.float().T * second).sum(1)
    squares += scale**2 * ((second @ (first @ first.T)) * second).sum(1)
    return squares.clamp(min=torch.finfo(torch.float32).tiny).sqrt()


def _is_quantised(base: Any) -> bool:
    return hasattr(base, "dequantize") or not base.weight.is_floating_point()


def _weight_of(base: Any) -> Tensor:
    """Return W in float32."""
    weight: Tensor = base.dequantize(torch.float32) if hasattr(base, "dequantize") else dequantize_module_weight(base)
    return weight.float()


@torch.no_grad()
def use_lean_dora(modules: Iterable[nn.Module], is_new: bool = False) -> None:
    """Let the DoRA adapters among the modules of a model compute their norms this way.

    Args:
        is_new: let the trained norms begin as those of the weights, which peft misreads where they are quantised and on
            a CPU.
    """
    layer: Any
    for layer in modules:
        variants = getattr(layer, "lora_variant", {})
        for name, variant in variants.items():
            if type(variant) is DoraLinearVariant:
                norms = torch.linalg.norm(_weight_of(layer.get_base_layer()), dim=1)
                layer.register_buffer(_NORMS, norms, persistent=False)
                variants[name] = LeanDora()
                if is_new:
                    magnitude = layer.lora_magnitude_vector[name].weight
                    magnitude.copy_(norms_of_sum(layer, name))
