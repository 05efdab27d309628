"""PiSSA and OLoRA: adapters that begin as a part of the base's weights, which stay as they are.

peft subtracts that part from the base in memory, so that its adapter fits the changed base only. Here a layer computes

    x W^T + s d(x) (B A - B0 A0)^T,   A = A0 + lora_A,  B = B0 + lora_B

with the initial values A0 and B0 frozen, and the trained differences ``lora_A`` and ``lora_B`` zero at first. Outputs
and gradients are those of peft's way, without its rounding of the changed base. What was learnt is a plain LoRA of
twice the rank on the original base:

    B A - B0 A0 = [B, lora_B] [lora_A; A0]

In that form it is computed and saved: no term is a small difference of large ones, so it survives 16 bits.

Shapes: R rank, I inputs, O outputs; A, A0 and lora_A [R, I], B, B0 and lora_B [O, R].
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

from errors import ConfigError

_INITIAL_A, _INITIAL_B = "lora_initial_A", "lora_initial_B"


class ChangeOfWeights(LoraVariant):
    """peft's hook for a layer's forward pass: adds the change of what the adapter began as."""

    takes_any_dtype = True  # see adapters.keep_input_dtype

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        dropped = module.lora_dropout[active_adapter](x)
        first, second = change_of(module, active_adapter)
        return result + F.linear(F.linear(dropped, first), second) * module.scaling[active_adapter]


def begins_as_weights(layer: Any, name: str) -> bool:
    """Return whether a layer's adapter began as a part of its weight."""
    return isinstance(getattr(layer, "lora_variant", {}).get(name), ChangeOfWeights)


def change_of(layer: Any, name: str) -> tuple[Tensor, Tensor]:
    """Return the matrices [2R, I] and [O, 2R] whose product, times the scale, was added to a layer's weight."""
    return _change(
        layer.lora_A[name].weight,
        layer.lora_B[name].weight,
        getattr(layer, _INITIAL_A)[name],
        getattr(layer, _INITIAL_B)[name],
    )


def _change(lora_a: Tensor, lora_b: Tensor, initial_a: Tensor, initial_b: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([lora_a, initial_a.to(lora_a.dtype)]), torch.cat([initial_b.to(lora_b.dtype) + lora_b, lora_b], 1)


@torch.no_grad()
def begin_as_weights(model: PeftModel, method: str) -> None:
    """Let new adapters begin as a part of their layers' weights.

    Args:
        method: ``pissa`` (the largest singular values), ``pissa_niter_N`` (the same, approximated by N iterations), or
            ``olora`` (the first rows and columns of a QR decomposition).

    Raises:
        ConfigError: a rank exceeds the size of a weight.
    """
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        for name, rank in layer.r.items():
            weight: Any = layer.get_base_layer().weight
            if rank > min(weight.shape):
                what = f"--init_lora_weights {method}: rank {rank} exceeds the weight of {path}, {tuple(weight.shape)}"
                raise ConfigError(what, f"Give --lora_r {min(weight.shape)} or less, or --lora_rank_pattern")
            first, second = initial_values(weight.float(), rank, layer.scaling[name], method)
            for matrices, values in ((layer.lora_A, first), (layer.lora_B, second)):
                matrices[name].weight = nn.Parameter(torch.zeros_like(values))
            setattr(layer, _INITIAL_A, _frozen(name, first.to(weight.dtype)))
            setattr(layer, _INITIAL_B, _frozen(name, second.to(weight.dtype)))
            layer.lora_variant[name] = ChangeOfWeights()


def _frozen(name: str, values: Tensor) -> nn.ParameterDict:
    return nn.ParameterDict({name: nn.Parameter(values.contiguous(), requires_grad=False)})


def initial_values(weight: Tensor, rank: int, scale: float, method: str) -> tuple[Tensor, Tensor]:
    """Return A0 [R, I] and B0 [O, R] of a weight [O, I], as peft initialises them."""
    if method == "olora":
        orthogonal, triangular = torch.linalg.qr(weight)
        return triangular[:rank], orthogonal[:, :rank]
    if method == "pissa":
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        left, values, right = left[:, :rank], values[:rank], right[:rank]
    else:
        iterations = int(method.removeprefix("pissa_niter_"))
        left, values, right = torch.svd_lowrank(weight, rank, niter=iterations)
        right = right.T
    roots = (values / scale).sqrt()
    return roots[:, None] * right, left * roots


def is_plain(model: nn.Module) -> bool:
    """Return whether no adapter of a model began as a part of its weights: the tensors are saved as they are."""
    return not any(hasattr(layer, _INITIAL_A) for layer in model.modules())


def plain_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the plain LoRA of twice the rank, by their names in a file, in float32."""
    plain = {name: tensor for name, tensor in tensors.items() if _INITIAL_A not in name and _INITIAL_B not in name}
    for name in [name for name in tensors if name.endswith(_INITIAL_A)]:
        place = name.removesuffix(_INITIAL_A)
        names = [f"{place}{part}" for part in ("lora_A.weight", "lora_B.weight", _INITIAL_A, _INITIAL_B)]
        plain[names[0]], plain[names[1]] = _change(*(tensors[each].float() for each in names))
    return plain


def plain_config(config: Any) -> Any:
    """Return peft's config of the plain LoRA of twice the rank, with the same scales."""
    plain, factor = copy.deepcopy(config), math.sqrt(2) if config.use_rslora else 2
    plain.r, plain.lora_alpha = 2 * config.r, config.lora_alpha * factor
    plain.rank_pattern = {key: 2 * rank for key, rank in (config.rank_pattern or {}).items()}
    plain.alpha_pattern = {key: alpha * factor for key, alpha in (config.alpha_pattern or {}).items()}
    return plain
