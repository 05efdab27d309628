"""Quantised weights: GPTQ's and AWQ's packed integers, read and written; NF4, FP4 and 8 bits of bitsandbytes, read.

A 32-bit word holds P = 32 / bits values. I inputs, O outputs, G groups of inputs that share a scale and a zero point:
a weight is ``scale * (value - zero)``.

GPTQ (Frantar et al. 2022) in auto-gptq's layout:
    qweight [I / P, O], packed along the inputs; qzeros [G, O / P], packed along the outputs, stored minus one in the
    first format; scales [G, O]; g_idx [I], the group of each input, which need not be sorted (act-order).
AWQ (Lin et al. 2023) in AutoAWQ's GEMM layout:
    qweight [I, O / P] and qzeros [G, O / P], packed along the outputs in the order 0 2 4 6 1 3 5 7; scales [G, O].
NF4 and FP4 (Dettmers et al. 2023) as bitsandbytes saves them:
    two values per byte, the first in the upper half, in one long row; each is an index into quant_map [16]; absmax, a
    scale per block of values, may itself be quantised: indices into nested_quant_map [256] with scales and an offset.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from checkpoints.model_config import Quantization, dtype_name
from errors import ConfigError

PARTS = ("qweight", "qzeros", "scales", "g_idx")
"""Tensors of a packed layer; ``g_idx`` may be absent."""

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""AWQ: the column (of eight) that is stored in each slot of a word, from the lowest bits up."""

Header = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a stored tensor, known without its data."""

_COPY_AGAIN = "Copy config.json and all weight files again from the original checkpoint"

# Weights unpacked at a time: on a CPU what fits in its caches, elsewhere enough to keep a GPU busy.
_CPU_CHUNK, _GPU_CHUNK = 1 << 18, 1 << 25


class IntegerWeight(NamedTuple):
    """A weight [O, I] as integers: ``scales * (values - zeros)``, with G groups of inputs.

    Attributes:
        values: int32 [O, I].
        scales: float16 [O, G].
        zeros: int32 [O, G].
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor


def pack_weight(weight: IntegerWeight, quantization: Quantization) -> dict[str, Tensor]:
    """Pack a weight for GPTQ or AWQ; return the tensors in ``PARTS``, on the CPU."""
    bits, per_word = quantization.bits, 32 // quantization.bits
    values, scales, zeros = (tensor.T.cpu() for tensor in weight)
    if quantization.method == "awq":
        qweight, qzeros = _pack_columns(values, bits, AWQ_ORDER), _pack_columns(zeros, bits, AWQ_ORDER)
        return {"qweight": qweight, "qzeros": qzeros, "scales": scales.contiguous()}
    qweight = torch.zeros(values.shape[0] // per_word, values.shape[1], dtype=torch.int32)
    for slot in range(per_word):
        qweight |= values[slot::per_word] << (bits * slot)
    zeros = (zeros - quantization.zero_offset) & _max_value(bits)
    return {
        "qweight": qweight,
        "qzeros": _pack_columns(zeros, bits, tuple(range(per_word))),
        "scales": scales.contiguous(),
        "g_idx": torch.arange(len(values), dtype=torch.int32) // quantization.group_size,
    }


def _pack_columns(values: Tensor, bits: int, order: tuple[int, ...]) -> Tensor:
    """[G, O] -> [G, O / P]: slot k of a word stores its column ``order[k]``."""
    packed = torch.zeros(values.shape[0], values.shape[1] // len(order), dtype=torch.int32)
    for slot, column in enumerate(order):
        packed |= values[:, column :: len(order)] << (bits * slot)
    return packed


def unpack_weight(
    parts: Mapping[str, Tensor], quantization: Quantization, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the weight [O, I] of a GPTQ or AWQ layer; products are exact in float32 and rounded once to ``dtype``.

    Args:
        parts: the layer's tensors, by the names in ``PARTS``. If ``g_idx`` is missing or empty, each group consists of
            consecutive inputs.
    """
    qweight, scales, bits = parts["qweight"], parts["scales"].float(), quantization.bits
    per_word, is_awq = 32 // bits, quantization.method == "awq"
    outputs, inputs = weight_shape(qweight.shape, quantization)
    shifts = _shifts(quantization).to(qweight.device)
    # A zero point of 0, stored minus one, wraps to the largest value: the mask turns it back into 0.
    zeros = (_unpack_columns(parts["qzeros"], shifts, bits) + quantization.zero_offset) & _max_value(bits)
    offsets = scales * zeros
    size, groups = quantization.inputs_per_group(inputs), parts.get("g_idx")
    if groups is not None and groups.numel() == 0:
        groups = None
    if groups is None and inputs % size:
        groups = torch.arange(inputs, device=qweight.device) // size
    unit = size if groups is None else per_word
    step = unit * max(1, (_CPU_CHUNK if qweight.device.type == "cpu" else _GPU_CHUNK) // (unit * outputs))
    weight = torch.empty(inputs, outputs, dtype=dtype, device=qweight.device)
    for start in range(0, inputs, step):
        end = min(start + step, inputs)
        if is_awq:
            values = _unpack_columns(qweight[start:end], shifts, bits)
        else:
            words = qweight[start // per_word : end // per_word, None]
            values = ((words >> shifts[:, None]) & _max_value(bits)).flatten(0, 1)
        if groups is None:
            of_groups = slice(start // size, end // size)
            block = values.view(-1, size, outputs) * scales[of_groups, None] - offsets[of_groups, None]
        else:
            of_inputs = groups[start:end].long()
            block = values * scales[of_inputs] - offsets[of_inputs]
        weight[start:end] = block.view(-1, outputs)
    return weight.T


def weight_shape(qweight: Sequence[int], quantization: Quantization) -> tuple[int, int]:
    """(O, I) of the weight that is packed into a ``qweight`` of this shape."""
    rows, columns, per_word = *qweight, 32 // quantization.bits
    return (columns * per_word, rows) if quantization.method == "awq" else (columns, rows * per_word)


def check_packed(layer: str, parts: Mapping[str, Header], quantization: Quantization) -> None:
    """Check that the stored tensors of a GPTQ or AWQ layer fit each other and the quantisation in the config.

    Args:
        layer: name of the layer, for messages.
        parts: shape and dtype of the layer's tensors, by the names in ``PARTS``.

    Raises:
        ConfigError: a wrong dtype or shape, or act-order without the group of each input.
    """
    _check_headers(layer, parts, {"qweight": (torch.int32, 2), "qzeros": (torch.int32, 2), "scales": (None, 2)})
    outputs, inputs = weight_shape(parts["qweight"][0], quantization)
    groups = -(-inputs // quantization.inputs_per_group(inputs))
    words = outputs // (32 // quantization.bits)
    expected: dict[str, tuple[int, ...]] = {"qzeros": (groups, words), "scales": (groups, outputs)}
    if quantization.act_order and math.prod(parts.get("g_idx", ((0,),))[0]) == 0:
        what = f"{layer}.g_idx is missing: with desc_act the groups of the inputs are not known without it"
        raise ConfigError(what, _COPY_AGAIN)
    if "g_idx" in parts and parts["g_idx"][0] != (0,):
        expected["g_idx"] = (inputs,)
    for part, shape in expected.items():
        if parts[part][0] != shape:
            raise ConfigError(
                f"{layer}.{part} has the shape {list(parts[part][0])}, {quantization} with {inputs} inputs and "
                f"{outputs} outputs needs {list(shape)}",
                _COPY_AGAIN,
            )


def check_group_indices(name: str, groups: Tensor, number: int) -> None:
    """Raise ``ConfigError`` unless each value of a ``g_idx`` is one of ``number`` groups."""
    if groups.is_floating_point() or groups.dtype == torch.bool:
        raise ConfigError(f"{name} is stored as {dtype_name(groups.dtype)}, not as integers", _COPY_AGAIN)
    if groups.numel() and not 0 <= int(groups.min()) <= int(groups.max()) < number:
        wrong = int(groups.min()) if int(groups.min()) < 0 else int(groups.max())
        raise ConfigError(f"{name} names group {wrong}, the layer has groups 0 to {number - 1}", _COPY_AGAIN)


def _check_headers(layer: str, parts: Mapping[str, Header], expected: Mapping[str, tuple[Any, int]]) -> None:
    """Check dtypes (``None``: any floating-point dtype) and numbers of dimensions."""
    for part, (dtype, dimensions) in expected.items():
        shape, stored = parts[part]
        name = f"{layer}.{part}" if part else layer
        if stored != dtype if dtype is not None else not stored.is_floating_point:
            needed = "a floating-point dtype" if dtype is None else dtype_name(dtype)
            raise ConfigError(f"{name} is stored as {dtype_name(stored)}, its quantisation needs {needed}", _COPY_AGAIN)
        if len(shape) != dimensions or 0 in shape:
            raise ConfigError(f"{name} has the shape {list(shape)}, not {dimensions} dimension(s)", _COPY_AGAIN)


def is_in_order(groups: Tensor, quantization: Quantization) -> bool:
    """Return whether each group of a ``g_idx`` consists of consecutive inputs, in order, so that it can be ignored."""
    consecutive = torch.arange(len(groups), device=groups.device) // quantization.inputs_per_group(max(1, len(groups)))
    return torch.equal(groups.to(consecutive.dtype), consecutive)


def _shifts(quantization: Quantization) -> Tensor:
    """[P]: the shift in bits of each value of a word, in the order of inputs (GPTQ) or outputs (AWQ)."""
    order = AWQ_ORDER if quantization.method == "awq" else range(32 // quantization.bits)
    slots = sorted(range(len(order)), key=lambda slot: order[slot])
    return torch.tensor([quantization.bits * slot for slot in slots], dtype=torch.int32)


def _unpack_columns(words: Tensor, shifts: Tensor, bits: int) -> Tensor:
    """[R, O / P] -> [R, O], for words packed along the outputs."""
    return ((words[:, :, None] >> shifts) & _max_value(bits)).flatten(1)


def _max_value(bits: int) -> int:
    return (1 << bits) - 1


def parse_4bit_state(name: str, values: Tensor) -> dict[str, Any]:
    """Parse the JSON object that bitsandbytes stores with a 4-bit weight, as bytes.

    Raises:
        ConfigError: it is not JSON, or lacks a number that dequantising needs.
    """
    try:
        state = json.loads(bytes(values.flatten().tolist()))
        sizes = [*state["shape"], state["blocksize"], state.get("nested_blocksize", 1)]
        is_valid = len(state["shape"]) == 2 and all(type(size) is int and size > 0 for size in sizes)
        is_valid = is_valid and math.isfinite(state.get("nested_offset", 0.0))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        is_valid = False
    if not is_valid:
        raise ConfigError(f"{name} does not describe a quantised weight", _COPY_AGAIN)
    return dict(state)


def check_4bit(weight: str, parts: Mapping[str, Header], state: Mapping[str, Any]) -> None:
    """Check that the stored tensors of an NF4 or FP4 weight fit its state.

    Args:
        weight: name of the weight, for messages.
        parts: shape and dtype of its tensors, by the suffix after ``.weight``.

    Raises:
        ConfigError: a wrong dtype or number of values.
    """
    is_nested = ".nested_absmax" in parts
    if is_nested and not (".nested_quant_map" in parts and {"nested_blocksize", "nested_offset"} <= state.keys()):
        raise ConfigError(f"{weight}: its scales are quantised, but not described", _COPY_AGAIN)
    elements = math.prod(state["shape"])
    scales = -(-elements // state["blocksize"])
    expected: dict[str, tuple[Any, int]] = {
        "": (torch.uint8, -(-elements // 2)), ".absmax": (torch.uint8 if is_nested else None, scales),
        ".quant_map": (None, 16),
    }  # fmt: skip
    if is_nested:
        expected[".nested_absmax"] = (None, -(-scales // state["nested_blocksize"]))
        expected[".nested_quant_map"] = (None, 256)
    dtypes = {part: (dtype, len(parts[part][0])) for part, (dtype, _) in expected.items()}
    _check_headers(weight, {part: parts[part] for part in expected}, dtypes)
    for part, (_, number) in expected.items():
        if math.prod(parts[part][0]) != number:
            stored = math.prod(parts[part][0])
            what = f"{weight}{part} has {stored} values, a weight of shape {state['shape']} needs {number}"
            raise ConfigError(what, _COPY_AGAIN)


def check_8bit(layer: str, parts: Mapping[str, Header]) -> None:
    """Raise ``ConfigError`` unless an 8-bit layer of bitsandbytes has int8 weights and one scale per output."""
    _check_headers(layer, parts, {"weight": (torch.int8, 2), "SCB": (None, len(parts["SCB"][0]))})
    outputs = parts["weight"][0][0]
    if math.prod(parts["SCB"][0]) != outputs:
        raise ConfigError(f"{layer}.SCB has the shape {list(parts['SCB'][0])}, not {[outputs]}", _COPY_AGAIN)


def dequantize_4bit(parts: Mapping[str, Tensor], state: Mapping[str, Any]) -> Tensor:
    """Return the weight [O, I] in float32 of an NF4 or FP4 layer of bitsandbytes.

    Args:
        parts: the tensors by the suffix after ``.weight`` in their names; the packed values have an empty suffix.
        state: the JSON object saved with them.
    """
    scales = parts[".absmax"]
    if ".nested_absmax" in parts:
        blocks = parts[".nested_absmax"].repeat_interleave(state["nested_blocksize"])[: scales.numel()]
        scales = parts[".nested_quant_map"][scales.int()] * blocks + state["nested_offset"]
    packed = parts[""].flatten()
    values = torch.empty(2 * packed.numel(), dtype=torch.uint8)
    values[0::2], values[1::2] = packed >> 4, packed & 15
    weight = parts[".quant_map"].float()[values.int()]
    padded = len(scales) * state["blocksize"]
    if len(weight) < padded:  # the last block may be incomplete
        weight = torch.nn.functional.pad(weight, (0, padded - len(weight)))
    weight = weight.view(-1, state["blocksize"]).mul_(scales[:, None]).flatten()
    outputs, inputs = state["shape"]
    return weight[: outputs * inputs].view(outputs, inputs)


def dequantize_8bit(values: Tensor, scales: Tensor) -> Tensor:
    """Return the weight [O, I] in float32 of an 8-bit layer of bitsandbytes: 127 stands for ``scales`` [O]."""
    return values.float() * (scales.float().flatten() / 127)[:, None]
