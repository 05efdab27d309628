"""How the weights of a checkpoint are quantised, from its config files alone; needs no torch."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from checkpoints.files import load_json_or_empty
from checkpoints.names import BASE_QUANTIZATION
from errors import ConfigError

Method = Literal["gptq", "awq", "nf4", "fp4", "int8"]

PACKED: tuple[Method, ...] = ("gptq", "awq")
"""Methods whose weights are packed integers with scales and zero points per group; the others are bitsandbytes'."""

_TITLES = {"gptq": "GPTQ", "awq": "AWQ", "nf4": "NF4", "fp4": "FP4", "int8": "8-bit"}
_UNQUANTISED = "Use the unquantised model, or one quantised as GPTQ, AWQ (GEMM) or by bitsandbytes"


@dataclass(frozen=True)
class Quantization:
    """What has to be known to read quantised weights.

    Attributes:
        group_size: inputs that share a scale; -1: all of a row; 0 with bitsandbytes, which says it in its tensors.
        zero_offset: what is added to a stored zero point: 1 in GPTQ's first format, else 0.
        file_name: of the weights, without suffix, where it is not the usual one.
    """

    method: Method
    bits: int
    group_size: int = 0
    zero_offset: int = 0
    file_name: str | None = None

    @property
    def is_packed(self) -> bool:
        return self.method in PACKED

    def inputs_per_group(self, inputs: int) -> int:
        """Inputs that share a scale in a layer of so many."""
        return inputs if self.group_size == -1 else self.group_size

    def __str__(self) -> str:
        if not self.is_packed:
            return f"{_TITLES[self.method]} by bitsandbytes"
        groups = "one group per row" if self.group_size == -1 else f"groups of {self.group_size}"
        return f"{_TITLES[self.method]}, {self.bits} bits, {groups}"


def find_quantization(folder: Path) -> Quantization | None:
    """How a checkpoint is quantised: as ``config.json`` says, or a file of the time before it did.

    These are ``quantize_config.json`` (auto-gptq) and ``quant_config.json`` (AutoAWQ). ``None`` for weights that are
    not quantised, and for a folder without a readable config: whoever loads it says why.

    Raises:
        ConfigError: a method, format or number of bits that cannot be read.
    """
    config = load_json_or_empty(folder / "config.json")
    if isinstance(given := config.get("quantization_config"), dict):
        return _parse(given, folder / "config.json", str(given.get("quant_method", "")))
    for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        if config and (given := load_json_or_empty(folder / name)):
            return _parse(given, folder / name, str(given.get("quant_method", method)))
    return None


def check_bitsandbytes(asking: str) -> None:
    """Raise ``ConfigError`` unless bitsandbytes can be imported; does not import it."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"{asking} needs bitsandbytes, which is not installed", "pip install bitsandbytes")


def load_base_quantization(folder: Path) -> Quantization | None:
    """How the base of the adapter in a folder was quantised to train it; ``None`` where it was loaded as it is.

    Raises:
        ConfigError: a method that cannot be read.
    """
    given = load_json_or_empty(folder / BASE_QUANTIZATION)
    return _parse(given, folder / BASE_QUANTIZATION, str(given.get("quant_method", ""))) if given else None


def _parse(given: dict[str, Any], file: Path, method: str) -> Quantization:
    if method == "bitsandbytes" or given.get("load_in_4bit") or given.get("load_in_8bit"):
        if given.get("load_in_8bit"):
            return Quantization("int8", 8)
        kind = given.get("bnb_4bit_quant_type", "fp4")
        return Quantization("nf4" if kind == "nf4" else "fp4", 4)
    # auto-gptq's first configs do not name their method; those of AutoAWQ have names of their own for the numbers.
    if method not in PACKED and not (method == "" and "bits" in given):
        raise ConfigError(f"{file}: weights quantised by {method or 'an unnamed method'} cannot be read", _UNQUANTISED)
    bits, group_size = (_number(given, names, file) for names in (("bits", "w_bit"), ("group_size", "q_group_size")))
    if method == "awq":
        layout = str(given.get("version") or given.get("checkpoint_format") or given.get("format") or "gemm").lower()
        if layout != "gemm":
            raise ConfigError(f"{file}: AWQ weights in the layout {layout!r} cannot be read, only 'gemm'", _UNQUANTISED)
        _check_bits(bits, (4,), file)
        return Quantization("awq", bits, group_size, file_name=_file_name(given))
    layout = str(given.get("checkpoint_format") or given.get("format") or "gptq").lower()
    if layout not in ("gptq", "gptq_v2"):
        raise ConfigError(f"{file}: GPTQ weights in the layout {layout!r} cannot be read", _UNQUANTISED)
    _check_bits(bits, (2, 4, 8), file)
    return Quantization("gptq", bits, group_size, zero_offset=int(layout == "gptq"), file_name=_file_name(given))


def _number(given: dict[str, Any], names: tuple[str, ...], file: Path) -> int:
    value = next((given[name] for name in names if name in given), None)
    if not isinstance(value, int) or isinstance(value, bool) or (value < 1 and value != -1):
        raise ConfigError(f"{file}: {names[0]} is {json.dumps(value)}", "Copy it again from the original checkpoint")
    return value


def _check_bits(bits: int, known: tuple[int, ...], file: Path) -> None:
    if bits not in known:
        raise ConfigError(f"{file}: {bits} bits cannot be read, only {' or '.join(map(str, known))}", _UNQUANTISED)


def _file_name(given: dict[str, Any]) -> str | None:
    name = given.get("model_file_base_name")
    return name if isinstance(name, str) and name not in ("", "model") and Path(name).name == name else None


DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""Qwen v1's flags in a config, which are also what commands call precisions, and torch's names."""


def declared_dtype(config: Mapping[str, Any]) -> str | None:
    """The name of the dtype that a config declares, by torch's name or by a flag; ``None`` where it says nothing."""
    declared = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    if declared in DTYPE_NAMES.values():
        return declared
    return next((name for flag, name in DTYPE_NAMES.items() if config.get(flag)), None)


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config that says its floats are in ``dtype``, under the keys that it has."""
    # Older folders say torch_dtype, newer ones dtype.
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    flags = {flag: name == dtype for flag, name in DTYPE_NAMES.items()} if config.get("model_type") == "qwen" else {}
    return {**config, **dict.fromkeys(keys, dtype), **flags}
