"""Quantised layers without their weights: storages of the packed sizes, and products that take what real ones take."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints.model_config import Quantization, check_bitsandbytes
from checkpoints.shards import open_checkpoint
from errors import ConfigError
from loading.checkpoint import Checkpoint
from loading.quantized import PackedConfig, QuantizedLinear, multiply
from qwen_model.architectures import architecture_of

_BLOCK, _NESTED_BLOCK = 64, 256  # of bitsandbytes: values per scale, scales per scale of scales


def quantize_on_meta(model: Any, checkpoint: Checkpoint, quantization: Quantization) -> None:
    """Replace the linear layers of the blocks by quantised ones, on the meta device.

    Raises:
        ConfigError: 8 bits, which are not rehearsed; bitsandbytes is needed and not installed.
    """
    if quantization.method == "int8":
        fix = "Rehearse 4 bits, or run a few steps with it"
        file = checkpoint.folder / "config.json"
        place = "--load_in_8bit" if checkpoint.quantization is None else f"--model_name_or_path {file}: load_in_8bit"
        raise ConfigError(f"{place} cannot be rehearsed: what its products keep depends on the values", fix)
    stored = {}
    if quantization.is_packed and any(checkpoint.folder.glob("*.safetensors")):
        stored = PackedConfig(quantization, open_checkpoint(checkpoint.folder)).layers
    if not quantization.is_packed:
        check_bitsandbytes(str(quantization))
        model.is_loaded_in_4bit = True  # peft then takes its own layers for 4 bits
    names = architecture_of(checkpoint.model_type).linear_layers
    for name, layer in [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]:
        if not name.endswith(tuple(f".{each}" for each in names)):
            continue
        if quantization.is_packed:
            parts = stored.get(name) or _packed_parts(layer, quantization)
            packed: Any = QuantizedLinear(layer.in_features, layer.out_features, parts, quantization)
            packed.has_ordered_groups = not quantization.act_order  # else it is read from the indices
        else:
            packed = _four_bit_layer(layer, quantization)
        model.set_submodule(name, packed)


def _packed_parts(layer: nn.Linear, quantization: Quantization) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shapes and dtypes of a GPTQ or AWQ layer, see ``checkpoints/packed_weights.py``."""
    inputs, outputs, per_word = layer.in_features, layer.out_features, 32 // quantization.bits
    groups = -(-inputs // quantization.inputs_per_group(inputs))
    parts: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "qzeros": ((groups, outputs // per_word), torch.int32),
        "scales": ((groups, outputs), torch.float16),
    }
    if quantization.method == "awq":
        parts["qweight"] = (inputs, outputs // per_word), torch.int32
    else:
        parts["qweight"] = (inputs // per_word, outputs), torch.int32
        parts["g_idx"] = (inputs,), torch.int32
    if layer.bias is not None:
        parts["bias"] = (outputs,), layer.bias.dtype
    return parts


def _four_bit_layer(linear: nn.Linear, quantization: Quantization) -> nn.Module:
    from bitsandbytes.nn.modules import Linear4bit

    class FourBitLayer(Linear4bit):
        """bitsandbytes' layer, with values of ``weight`` and its scales that do not exist."""

        absmax: Tensor

        def dequantize(self, dtype: torch.dtype) -> Tensor:
            """Return the weight [O, I]; the scales are dequantised beside it."""
            scales = torch.empty(self.absmax.shape, dtype=torch.float32, device=self.weight.device)
            weight = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.weight.device)
            del scales
            return weight

        forward = multiply

    count = linear.in_features * linear.out_features
    blocks = math.ceil(count / _BLOCK)
    with torch.device("meta"):
        layer = FourBitLayer(
            linear.in_features, linear.out_features, linear.bias is not None, quant_type=quantization.method
        )
        packed: Any = nn.Parameter(torch.empty(-(-count // 2), 1, dtype=torch.uint8), requires_grad=False)
        packed.compress_statistics, packed.quant_type = True, quantization.method  # peft reads them
        layer.weight = packed
        layer.register_buffer("absmax", torch.empty(blocks, dtype=torch.uint8), persistent=False)
        layer.register_buffer("nested_absmax", torch.empty(math.ceil(blocks / _NESTED_BLOCK)), persistent=False)
        layer.register_buffer("codes", torch.empty(16 + 256), persistent=False)
    layer.bias = linear.bias
    return layer
