"""Tiny GPTQ and AWQ checkpoints, written from the descriptions of the formats without their libraries.

Every writer rounds the weights of the blocks to the nearest value of their group, leaves the others in float16 as the
published checkpoints do, and returns the weights [O, I] that the packed integers encode, exact in float32.

I inputs, O outputs, G groups of inputs, P values in a word of 32 bits.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from scripts.make_tiny_qwen import main as make_tiny_qwen
from tests.models import change_json

_BLOCK_WEIGHT = re.compile(r"(transformer\.h|model\.layers)\.\d+\..+\.weight")
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class _IntegerMatrix(NamedTuple):
    """A matrix as ``scales[groups[i], o] * (values[i, o] - zeros[groups[i], o])``."""

    values: Tensor  # [I, O]
    zeros: Tensor  # [G, O]
    scales: Tensor  # [G, O], float16
    groups: Tensor  # [I]

    def weight(self) -> Tensor:
        """[O, I] in float32, in which these products are exact."""
        return ((self.values - self.zeros[self.groups]) * self.scales.float()[self.groups]).T.contiguous()


def write_gptq(
    source: Path,
    target: Path,
    bits: int = 4,
    group_size: int = 32,
    desc_act: bool = False,
    sym: bool = True,
    zeros: Literal["v1", "v2"] = "v1",
    config: Literal["2023", "unnamed", "new", "quantize_config.json"] = "2023",
    zero_biases: bool = True,
    file_name: str = "model",
) -> dict[str, Tensor]:
    """Write a float checkpoint in GPTQ's layout; return the weights that it encodes.

    Args:
        group_size: inputs that share a scale; -1: all of them.
        desc_act: the inputs of a group are not adjacent.
        sym: every zero point is the middle of the range; otherwise each group has its own.
        zeros: ``v1``, the first format, stores zero points minus one.
        config: ``2023`` as in Qwen-7B-Chat-Int4, ``unnamed`` the same without quant_method, ``new`` as gptqmodel writes
            it, ``quantize_config.json`` a separate file as before config.json contained it.
        zero_biases: as auto-gptq, write a bias for every layer, of zeros if the model has none.
        file_name: name of the weights without suffix.
    """
    assert zeros == "v1" or config == "new", "only newer configs can name the second format of zero points"

    def pack(weight: Tensor) -> tuple[_IntegerMatrix, dict[str, Tensor]]:
        rounded = _round(weight, bits, _groups(weight, group_size, desc_act), sym)
        in_order = range(32 // bits)
        return rounded, {
            "qweight": _pack(rounded.values.T, bits, in_order).T.contiguous(),
            "qzeros": _pack(rounded.zeros - int(zeros == "v1"), bits, in_order),
            "scales": rounded.scales,
            "g_idx": rounded.groups.int(),
        }

    weights = _write(source, target, pack, zero_biases, file_name)
    common = {"bits": bits, "group_size": group_size, "damp_percent": 0.01, "desc_act": desc_act, "sym": sym}
    old = {**common, "true_sequential": True, "model_name_or_path": None, "model_file_base_name": file_name}
    if config in ("2023", "unnamed"):
        named = {"quant_method": "gptq"} if config == "2023" else {}
        change_json(target / "config.json", quantization_config={**old, "static_groups": False, **named})
    if config in ("unnamed", "quantize_config.json"):
        _write_json(target / "quantize_config.json", **old)
    if config == "new":
        layout = "gptq" if zeros == "v1" else "gptq_v2"
        new = {"quant_method": "gptq", "checkpoint_format": layout, "lm_head": False, "pack_dtype": "int32"}
        change_json(target / "config.json", quantization_config={**common, "true_sequential": True, **new})
    return weights


def write_awq(
    source: Path,
    target: Path,
    bits: int = 4,
    group_size: int = 32,
    version: str = "gemm",
    config: Literal["2023", "quant_config.json"] = "2023",
) -> dict[str, Tensor]:
    """Write a float checkpoint in AutoAWQ's GEMM layout; return the weights that it encodes.

    Args:
        version: name of the layout in the config; the tensors always have the GEMM layout.
        config: ``2023`` as in TheBloke's checkpoints, ``quant_config.json`` the earlier file of AutoAWQ.
    """
    assert bits == 4, "AWQ packs 4 bits"

    def pack(weight: Tensor) -> tuple[_IntegerMatrix, dict[str, Tensor]]:
        rounded = _round(weight, bits, _groups(weight, group_size), sym=False)
        return rounded, {
            "qweight": _pack(rounded.values, bits, _AWQ_ORDER),
            "qzeros": _pack(rounded.zeros, bits, _AWQ_ORDER),
            "scales": rounded.scales,
        }

    weights = _write(source, target, pack)
    if config == "2023":
        values = {"quant_method": "awq", "zero_point": True, "group_size": group_size, "bits": bits, "version": version}
        change_json(target / "config.json", quantization_config={**values, "modules_to_not_convert": None})
    else:
        numbers = {"q_group_size": group_size, "w_bit": bits}
        _write_json(target / "quant_config.json", zero_point=True, version=version.upper(), **numbers)
    return weights


def write_dequantized(source: Path, target: Path, weights: dict[str, Tensor]) -> Path:
    """Write the dequantised checkpoint in float32: the encoded weights, and the others rounded to float16.

    Args:
        source: the float checkpoint that was quantised.
        weights: result of the function that wrote the quantised one.
    """
    rest = {name: tensor.half().float() for name, tensor in _read(source).items() if name not in weights}
    _copy_files(source, target, torch.float32)
    save_file({**rest, **weights}, target / "model.safetensors", metadata={"format": "pt"})
    return target


def write_wide(folder: Path) -> Path:
    """Write a random Qwen v1 checkpoint whose layers are wide enough for groups of 128 inputs."""
    sizes = "--hidden_size 128 --intermediate_size 512 --num_hidden_layers 1 --num_attention_heads 4"
    make_tiny_qwen(["--output", str(folder), *sizes.split()])
    return folder


def _write(
    source: Path,
    target: Path,
    pack: Callable[[Tensor], tuple[_IntegerMatrix, dict[str, Tensor]]],
    zero_biases: bool = False,
    file_name: str = "model",
) -> dict[str, Tensor]:
    tensors, weights = {}, {}
    for name, tensor in _read(source).items():
        if tensor.dim() != 2 or not _BLOCK_WEIGHT.fullmatch(name):
            tensors[name] = tensor.half()
            continue
        layer = name.removesuffix(".weight")
        rounded, parts = pack(tensor.float())
        weights[name] = rounded.weight()
        tensors |= {f"{layer}.{part}": packed for part, packed in parts.items()}
        if zero_biases:
            tensors.setdefault(f"{layer}.bias", torch.zeros(len(tensor), dtype=torch.float16))
    _copy_files(source, target, torch.float16)
    save_file(tensors, target / f"{file_name}.safetensors", metadata={"format": "pt"})
    return weights


def _read(folder: Path) -> dict[str, Tensor]:
    # Biases last, so that those of the model replace the zero biases.
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    return dict(sorted(tensors.items(), key=lambda item: item[0].endswith(".bias")))


def _copy_files(source: Path, target: Path, dtype: torch.dtype) -> None:
    target.mkdir(parents=True)
    for file in source.iterdir():
        if not file.name.startswith("model") and file.is_file():
            shutil.copyfile(file, target / file.name)
    half = dtype == torch.float16
    precision: dict[str, Any] = {"torch_dtype": "float16" if half else "float32", "dtype": None}
    if '"model_type": "qwen"' in (source / "config.json").read_text(encoding="utf-8"):
        precision |= {"bf16": False, "fp16": half, "fp32": not half}
    change_json(target / "config.json", **precision)


def _write_json(path: Path, **values: Any) -> None:
    path.write_text("{}")
    change_json(path, **values)


def _groups(weight: Tensor, group_size: int, desc_act: bool = False) -> Tensor:
    """Return the group of each input, [I]. With ``desc_act`` the inputs with the largest weights are grouped first."""
    inputs = weight.shape[1]
    groups = torch.arange(inputs) // (inputs if group_size == -1 else group_size)
    if desc_act:
        groups[weight.norm(dim=0).argsort(descending=True)] = groups.clone()
    return groups


def _round(weight: Tensor, bits: int, groups: Tensor, sym: bool) -> _IntegerMatrix:
    """Round a weight [O, I] to the nearest values of its groups."""
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    members = [weight[:, groups == group] for group in range(int(groups.max()) + 1)]
    high = torch.stack([member.amax(1) for member in members]).clamp(min=1e-4)
    low = torch.stack([member.amin(1) for member in members]).clamp(max=-1e-4)
    if sym:
        scales = (torch.maximum(high, -low) / (middle - 1)).half()
        zeros = torch.full_like(scales, middle, dtype=torch.int64)
    else:
        scales = ((high - low) / top).half()
        # Stored minus one, a zero point of 0 could not be represented.
        zeros = (-low / scales.float()).round().long().clamp(1, top)
    values = ((weight.T / scales.float()[groups]).round().long() + zeros[groups]).clamp(0, top)
    return _IntegerMatrix(values, zeros, scales, groups)


def _pack(values: Tensor, bits: int, order: Sequence[int]) -> Tensor:
    """Pack [N, M] into int32 [N, M / P]: column ``order[k]`` of a word is at its bits from ``bits * k``."""
    per_word = 32 // bits
    word = sum((values[:, column::per_word] << (bits * index) for index, column in enumerate(order)), torch.tensor(0))
    return torch.where(word < 2**31, word, word - 2**32).int().contiguous()
