"""Quantised models to train adapters on and to ask: how they are loaded, and what their layers compute.

GPTQ and AWQ weights stay as they are on disk. They are made floating-point where they are multiplied, in the forward
pass and once more in the backward pass, so that no such copy outlives its product; every device takes this way.
bitsandbytes' own layers do the same for NF4, FP4 and 8 bits.

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

from checkpoints.model_config import Quantization, check_bitsandbytes
from checkpoints.packed_weights import PARTS, is_in_order, unpack_weight, weight_shape
from checkpoints.shards import CheckpointReader, open_checkpoint
from errors import ConfigError

_METHOD = "packed_integers"


class QuantizedLinear(nn.Linear):
    """A linear layer over packed integers, frozen; only its input (and its bias, where asked) gets a gradient.

    A linear layer to peft and everyone else who looks at types and shapes; ``weight`` is computed when it is read.

    Args:
        parts: shape and dtype of each stored tensor, by the last part of its name.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        parts: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        quantization: Quantization,
    ) -> None:
        super(nn.Linear, self).__init__()  # nn.Linear's own would make a weight
        self.in_features, self.out_features, self.quantization = in_features, out_features, quantization
        for name in PARTS:
            if name in parts:
                shape, dtype = parts[name]
                self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))
        bias = parts.get("bias")
        bias_values = None if bias is None else torch.empty(bias[0], dtype=bias[1], device="meta")
        self.register_parameter("bias", None if bias_values is None else nn.Parameter(bias_values, requires_grad=False))
        self._is_in_order: bool | None = None

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[O, I] in float32, a copy."""
        return self.dequantize(torch.float32)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight [O, I]; what a layer was padded with to whole words and groups is left out."""
        parts = {name: part for name, part in self._buffers.items() if part is not None}
        if self._is_in_order is None:  # asked once: on a GPU the answer is waited for
            self._is_in_order = "g_idx" not in parts or is_in_order(parts["g_idx"], self.quantization)
        if self._is_in_order:
            parts.pop("g_idx", None)
        return unpack_weight(parts, self.quantization, dtype)[: self.out_features, : self.in_features]

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O], in the precision of autocast, or of ``x`` without it."""
        return _multiply(self, x)


class Frozen(Protocol):
    """A linear layer whose weight is computed when it is multiplied."""

    out_features: int

    @property
    def bias(self) -> Tensor | None: ...

    def dequantize(self, dtype: torch.dtype) -> Tensor: ...


def _multiply(layer: Frozen, x: Tensor) -> Tensor:
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    product: Tensor = _FrozenProduct.apply(x.to(dtype), layer)
    return product if layer.bias is None else product + layer.bias[: layer.out_features].to(dtype)


class _FrozenProduct(torch.autograd.Function):
    """``x @ weight.T`` that keeps neither ``x`` nor the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Frozen) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantize(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        return grad_output @ ctx.layer.dequantize(grad_output.dtype), None


class CastingLinear(nn.Linear):
    """A linear layer that computes in the precision of its input, whatever it is stored in."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class StoredEmbedding(nn.Embedding):
    """An embedding whose rows come out in float32, whatever it is stored in."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).float()


def compute_in_float32(model: nn.Module) -> None:
    """Let a model that is stored in 16 bits compute in float32, without a wider copy of its weights.

    Norms multiply float32 states by their weight and stay there, quantised layers follow their input.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = CastingLinear
        elif type(module) is nn.Embedding:
            module.__class__ = StoredEmbedding


@register_quantization_config(_METHOD)
class PackedConfig(QuantizationConfigMixin):
    """What ``PackedQuantizer`` is told: how a checkpoint is quantised, and names, shapes and dtypes of its tensors."""

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
    """Puts ``QuantizedLinear`` where the checkpoint has packed weights, while transformers loads it."""

    quantization_config: PackedConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, parts in self.quantization_config.layers.items():
            try:
                linear = model.get_submodule(name)
            except AttributeError:
                raise ConfigError(f"{name} is quantised, and the model has no such layer") from None
            if not isinstance(linear, nn.Linear):
                raise ConfigError(f"{name} is quantised, and no linear layer")
            quantization = self.quantization_config.quantization
            _check_shapes(name, linear, parts, quantization)
            model.set_submodule(name, QuantizedLinear(linear.in_features, linear.out_features, parts, quantization))
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        del model.config.quantization_config  # it goes into files and logs, and only this class can read it
        return model

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained on it."""
        return True

    def is_serializable(self) -> bool:
        return False


def _check_shapes(
    name: str,
    linear: nn.Linear,
    parts: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    quantization: Quantization,
) -> None:
    """Raise unless a layer's tensors are all there and large enough; more than enough is padding."""
    missing = [part for part in PARTS[:3] if part not in parts]
    if missing:
        raise ConfigError(f"{name}.{missing[0]} is missing", "Copy the weights again from the original checkpoint")
    per_word = 32 // quantization.bits
    outputs, inputs = weight_shape(parts["qweight"][0], quantization)
    groups = -(-inputs // quantization.inputs_per_group(inputs))
    expected = {"qzeros": (groups, outputs // per_word), "scales": (groups, outputs), "g_idx": (inputs,)}
    wrong = [part for part, shape in expected.items() if part in parts and parts[part][0] not in (shape, (0,))]
    if inputs < linear.in_features or outputs < linear.out_features or wrong:
        part = wrong[0] if wrong else "qweight"
        raise ConfigError(
            f"{name}.{part} has the shape {parts[part][0]}, which does not fit a layer of {linear.in_features} inputs "
            f"and {linear.out_features} outputs in {quantization}",
            "The config belongs to another checkpoint: copy both again",
        )


def loading_arguments(
    folder: Path, config: Any, saved: Quantization | None, quantize: Quantization | None, dtype: torch.dtype
) -> dict[str, Any]:
    """What transformers' ``from_pretrained`` has to be told beside the folder to load a quantised model.

    Args:
        saved: how the weights in the folder are quantised.
        quantize: how they are to be quantised while they are loaded (by bitsandbytes), where they are not yet.
        dtype: the precision that bitsandbytes' layers compute in.

    Raises:
        ConfigError: bitsandbytes is wanted and not installed.
    """
    quantization = saved or quantize
    assert quantization is not None, "nothing is quantised"
    arguments: dict[str, Any] = {"config": copy.deepcopy(config)}
    if quantization.is_packed:
        # transformers would bring layers of its own for what the config says.
        if hasattr(arguments["config"], "quantization_config"):
            del arguments["config"].quantization_config
        reader = open_checkpoint(folder)
        arguments["quantization_config"] = PackedConfig(quantization, reader)
        if quantization.file_name is not None and reader.files[0].stem.startswith(quantization.file_name):
            arguments["state_dict"] = {name: reader.read(name) for name in reader.names()}
        return arguments
    check_bitsandbytes(str(quantization))
    # To quantise is to move to the device, and the Trainer leaves these models where they are.
    arguments["device_map"] = {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
    if saved is not None:
        # AutoConfig leaves it a dictionary.
        arguments["config"].quantization_config["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")
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
    """Have bitsandbytes' 4-bit layers compute with one and the same weight, in training and in evaluation.

    They dequantise to the precision that the weights once had, or, without gradients, not at all; here it is ``dtype``.
    On a CPU (bitsandbytes 0.50) they also read rows of other than whole blocks wrongly, and where it has bfloat16
    instructions repack their weights in the first evaluation: with coarser scales, and for a product that has no
    gradient, also when training goes on. There they take the way of ``QuantizedLinear``.
    """
    for module in model.modules():
        if (state := getattr(getattr(module, "weight", None), "quant_state", None)) is not None:
            state.dtype = dtype
            if isinstance(module.weight, Tensor) and module.weight.device.type == "cpu":
                module.__class__ = _linear_4bit_of_cpus()


@cache
def _linear_4bit_of_cpus() -> type[nn.Module]:
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn.modules import Linear4bit

    class CpuLinear4bit(Linear4bit):
        def dequantize(self, dtype: torch.dtype) -> Tensor:
            """The weight [O, I], read as one long row."""
            packed: Any = self.weight
            state = copy.copy(packed.quant_state)
            shape, state.shape, state.dtype = state.shape, torch.Size((1, math.prod(state.shape))), dtype
            weight: Tensor = dequantize_4bit(packed.data, state)
            return weight.view(shape)

        forward = _multiply

    return CpuLinear4bit


def count_elements(parameter: nn.Parameter) -> int:
    """Elements of a parameter, also of one of which ZeRO-3 left this process a share."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def count_weights(model: nn.Module) -> int:
    """Weights of a model, of quantised layers as many as they stand for."""
    packed = (module for module in model.modules() if isinstance(module, QuantizedLinear))
    plain = sum(
        count_elements(parameter)
        if (state := getattr(parameter, "quant_state", None)) is None
        else math.prod(state.shape)
        for parameter in model.parameters()
    )
    return plain + sum(module.in_features * module.out_features for module in packed)
