"""Quantised models for training adapters and for inference: how they are loaded, and what their layers compute.

GPTQ and AWQ weights stay packed in memory. They are dequantised for each product, in the forward pass and again in the
backward pass, so that no floating-point copy outlives its product; this is the same on every device. bitsandbytes' own
layers do the same for NF4, FP4 and 8 bits.

Shapes: I inputs, O outputs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from checkpoints.model_config import Quantization, check_bitsandbytes, dtype_name
from checkpoints.packed_weights import PARTS, is_in_order, unpack_weight
from checkpoints.shards import CheckpointReader, open_checkpoint
from errors import ConfigError

_METHOD = "packed_integers"


class QuantizedLinear(nn.Linear):
    """A frozen linear layer over packed integers; gradients flow to its input, and to its bias if that trains.

    It is an ``nn.Linear`` so that peft recognises it; ``weight`` is computed each time it is read.

    Args:
        parts: shape and dtype of each stored tensor, by the last part of its name.
    """

    is_linear_map = True  # see qwen_model.head

    def __init__(
        self,
        in_features: int,
        out_features: int,
        parts: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        quantization: Quantization,
    ) -> None:
        super(nn.Linear, self).__init__()  # nn.Linear's own would allocate a weight
        self.in_features, self.out_features, self.quantization = in_features, out_features, quantization
        for name in PARTS:
            if name in parts:
                shape, dtype = parts[name]
                self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))
        bias = parts.get("bias")
        bias_values = None if bias is None else torch.empty(bias[0], dtype=bias[1], device="meta")
        self.register_parameter("bias", None if bias_values is None else nn.Parameter(bias_values, requires_grad=False))
        self.has_ordered_groups: bool | None = None

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantised weight [O, I] in float32."""
        return self.dequantize(torch.float32)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight [O, I], without the padding to whole words and groups."""
        parts = {name: part for name, part in self._buffers.items() if part is not None}
        if self.has_ordered_groups is None:  # computed once: on a GPU it synchronises
            self.has_ordered_groups = "g_idx" not in parts or is_in_order(parts["g_idx"], self.quantization)
        if self.has_ordered_groups:
            parts.pop("g_idx", None)
        return unpack_weight(parts, self.quantization, dtype)[: self.out_features, : self.in_features]

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O], in the dtype of autocast, or else of ``x``."""
        return multiply(self, x)


class PackedLinear(Protocol):
    """A linear layer whose weight is computed for each product."""

    out_features: int

    @property
    def bias(self) -> Tensor | None: ...

    def dequantize(self, dtype: torch.dtype) -> Tensor: ...


def multiply(layer: PackedLinear, x: Tensor) -> Tensor:
    """Compute the output of a packed layer, in the dtype of autocast, or else of ``x``."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    product = _FrozenProduct.apply(x.to(dtype), layer)
    return product if layer.bias is None else product + layer.bias[: layer.out_features].to(dtype)


class _FrozenProduct(torch.autograd.Function):
    """``x @ weight.T`` that saves neither ``x`` nor the weight for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantize(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        return grad_output @ ctx.layer.dequantize(grad_output.dtype), None


class CastingLinear(nn.Linear):
    """A linear layer that casts its weight to the dtype of its input."""

    is_linear_map = True  # see qwen_model.head

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Float32Embedding(nn.Embedding):
    """An embedding that returns float32 whatever the dtype of its weight."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).float()


def compute_in_float32(model: nn.Module) -> None:
    """Let a model with 16-bit weights compute in float32, without a float32 copy of its weights.

    Norms keep float32 states in float32, and quantised layers follow the dtype of their input.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = CastingLinear
        elif type(module) is nn.Embedding:
            module.__class__ = Float32Embedding
        elif isinstance(module, nn.Conv1d):  # its input would be rounded to the dtype of its few weights
            module.float()


@register_quantization_config(_METHOD)
class PackedConfig(QuantizationConfigMixin):
    """Input of ``PackedQuantizer``: how a checkpoint is quantised; names, shapes and dtypes of its tensors."""

    def __init__(self, quantization: Quantization, reader: CheckpointReader) -> None:
        self.quant_method = _METHOD  # type: ignore[assignment]
        self.quantization = quantization
        self.layers: dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]] = {}
        packed = {name.removesuffix(".qweight") for name in reader.names() if name.endswith(".qweight")}
        for name in reader.names():
            layer, _, part = name.rpartition(".")
            if layer in packed:
                self.layers.setdefault(layer, {})[part] = (reader.shape(name), reader.dtype(name))


@register_quantizer(_METHOD)
class PackedQuantizer(HfQuantizer):
    """Replaces linear layers by ``QuantizedLinear`` before transformers loads a checkpoint with packed weights."""

    quantization_config: PackedConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, parts in self.quantization_config.layers.items():
            try:
                linear = model.get_submodule(name)
            except AttributeError:
                raise ConfigError(f"{name} is quantised, but the model has no such layer") from None
            if not isinstance(linear, nn.Linear):
                raise ConfigError(f"{name} is quantised, but is not a linear layer")
            quantization = self.quantization_config.quantization
            model.set_submodule(name, QuantizedLinear(linear.in_features, linear.out_features, parts, quantization))
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        del model.config.quantization_config  # it would be saved and logged, but only this class can read it
        return model

    @property
    def is_trainable(self) -> bool:
        """Return whether transformers' Trainer accepts adapters on the model."""
        return True

    def is_serializable(self) -> bool:
        return False


def loading_arguments(
    folder: Path, config: Any, saved: Quantization | None, quantize: Quantization | None, dtype: torch.dtype
) -> dict[str, Any]:
    """Build the arguments of ``from_pretrained`` that load a quantised model.

    Args:
        saved: how the weights in the folder are quantised; ``None`` if they are not.
        quantize: how bitsandbytes quantises them while loading, if they are not quantised yet.
        dtype: precision that bitsandbytes' layers compute in.

    Raises:
        ConfigError: bitsandbytes is required and not installed.
    """
    quantization = saved or quantize
    assert quantization is not None, "nothing is quantised"
    arguments: dict[str, Any] = {"config": copy.deepcopy(config)}
    if quantization.is_packed:
        # With it transformers would use layers of its own.
        if hasattr(arguments["config"], "quantization_config"):
            del arguments["config"].quantization_config
        reader = open_checkpoint(folder)
        arguments["quantization_config"] = PackedConfig(quantization, reader)
        if quantization.file_name is not None and reader.files[0].stem.startswith(quantization.file_name):
            arguments["state_dict"] = {name: reader.read(name) for name in reader.names()}
        return arguments
    check_bitsandbytes(str(quantization))
    # bitsandbytes quantises on moving to the device, and the Trainer does not move quantised models.
    arguments["device_map"] = {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
    if saved is not None:
        # AutoConfig keeps it as a dictionary.
        arguments["config"].quantization_config["bnb_4bit_compute_dtype"] = dtype_name(dtype)
    elif quantization.method == "int8":
        arguments["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    else:
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization.method,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return arguments


def patch_bitsandbytes_linear(model: nn.Module, dtype: torch.dtype) -> None:
    """Make bitsandbytes' 4-bit layers compute with the same weight in training and in evaluation.

    By default they dequantise to the dtype that the weights had before, or, without gradients, not at all; this sets it
    to ``dtype``. On a CPU, bitsandbytes 0.50 also misreads rows that are not whole blocks, and with bfloat16
    instructions it repacks the weights in the first evaluation: with coarser scales, and for a product without a
    gradient, even if training continues. On a CPU the layers therefore compute as ``QuantizedLinear`` does. On other
    devices they can be dequantised, for ``qwen_model.adapted_linear``.
    """
    for module in model.modules():
        if (state := getattr(getattr(module, "weight", None), "quant_state", None)) is not None:
            state.dtype = dtype
            if isinstance(module.weight, Tensor):
                module.__class__ = _linear_4bit(module.weight.device.type == "cpu")


@cache
def _linear_4bit(on_cpu: bool) -> type[nn.Module]:
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn.modules import Linear4bit

    class DequantizedLinear4bit(Linear4bit):
        def dequantize(self, dtype: torch.dtype) -> Tensor:
            """Return the weight [O, I], dequantised as one long row."""
            packed: Any = self.weight
            state = copy.copy(packed.quant_state)
            shape, state.shape, state.dtype = state.shape, torch.Size((1, math.prod(state.shape))), dtype
            return dequantize_4bit(packed.data, state).view(shape)

    class CpuLinear4bit(DequantizedLinear4bit):
        forward = multiply  # type: ignore[assignment]

    return CpuLinear4bit if on_cpu else DequantizedLinear4bit


def count_elements(parameter: nn.Parameter) -> int:
    """Count the elements of a parameter, before sharding by ZeRO-3."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def count_weights(model: nn.Module) -> int:
    """Count the weights of a model; quantised layers count the weights that they encode."""
    packed = (module for module in model.modules() if isinstance(module, QuantizedLinear))
    others = sum(
        count_elements(parameter)
        if (state := getattr(parameter, "quant_state", None)) is None
        else math.prod(state.shape)
        for parameter in model.parameters()
    )
    return others + sum(module.in_features * module.out_features for module in packed)
