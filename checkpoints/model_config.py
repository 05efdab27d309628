"""Dtype and quantisation of a checkpoint, as its config files declare them.

Needs no torch.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from checkpoints.files import is_file, load_json
from checkpoints.names import BASE_QUANTIZATION
from checkpoints.whole import has_other_parts, text_config, with_text_config
from console import pip_command
from errors import ConfigError

DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""Short names (boolean flags in Qwen v1's config.json, values of ``--dtype``) -> torch's names."""

Rounding = Literal["dithered", "nearest"]
"""How changed weights are rounded to 16 bits, see ``checkpoints/rounding.py``; the first one is the default."""
ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)


def dtype_name(dtype: object) -> str:
    """Return a torch dtype's name without its module, as config.json has it: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def declared_dtype(config: Mapping[str, Any]) -> str | None:
    """Return the dtype that a config.json declares by name or flag, as torch's name; ``None`` if it declares none."""
    declared = dtype_name(config.get("dtype") or config.get("torch_dtype") or "")
    if declared in DTYPE_NAMES.values():
        return declared
    return next((name for flag, name in DTYPE_NAMES.items() if config.get(flag)), None)


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return a copy of a config.json that declares ``dtype``, under the keys that it already has."""
    # Older checkpoints have the key torch_dtype, newer ones dtype.
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    flags = {flag: name == dtype for flag, name in DTYPE_NAMES.items()} if config.get("model_type") == "qwen" else {}
    return {**config, **dict.fromkeys(keys, dtype), **flags}


ROUNDED_AS = "base_rounded_as"
"""Key of a merged config.json: how the linear layers of the base were rounded before the merge."""


def result_config(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return the config.json of weights that were made from a checkpoint's: its own, but for what is not true of them.

    Left out are ``auto_map``, because code is not copied, and what describes the values, which have changed.
    """
    kept = {key: value for key, value in config.items() if key not in ("auto_map", "converted_from", ROUNDED_AS)}
    return with_text_config(kept, with_both_rope_forms(with_dtype(text_config(kept), dtype)))


def with_both_rope_forms(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a config.json whose ``rope_parameters`` are also under the keys from before transformers 5.

    transformers 4 does not read ``rope_parameters`` and takes a ``rope_theta`` of 10,000 without a warning. Models that
    it does not know need no older keys.
    """
    rope = None if has_other_parts(config) else config.get("rope_parameters")
    if not isinstance(rope, dict) or rope.get("rope_theta") is None:
        return dict(config)
    older = {"rope_theta": rope["rope_theta"]}
    if rope.get("rope_type", "default") != "default":
        older["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {**config, **{key: value for key, value in older.items() if config.get(key) is None}}


Method = Literal["gptq", "awq", "nf4", "fp4", "int8"]

# Methods that store packed integers with scales and zero points per group; the others are those of bitsandbytes.
_PACKED: tuple[Method, ...] = ("gptq", "awq")

_TITLES = {"gptq": "GPTQ", "awq": "AWQ", "nf4": "NF4", "fp4": "FP4", "int8": "8-bit"}
_USE_UNQUANTISED = (
    "Use the unquantised model: its name is that of this one without -FP8. --q_lora quantises it in memory"
)
_USE_ANOTHER = "Use the unquantised model, or one quantised as GPTQ, AWQ (GEMM) or by bitsandbytes"


@dataclass(frozen=True)
class Quantization:
    """The quantisation of a checkpoint's weights.

    Attributes:
        group_size: inputs that share a scale; -1: all inputs; 0 with bitsandbytes, which stores it beside the weights.
        zero_offset: added to each stored zero point: 1 in the first GPTQ format, else 0.
        file_name: of the weights, without suffix, if it is not the usual one.
        act_order: GPTQ: the inputs of a group need not be consecutive, so that the group of each is stored.
        symmetric: GPTQ, when quantising: every zero point is the middle value.
    """

    method: Method
    bits: int
    group_size: int = 0
    zero_offset: int = 0
    file_name: str | None = None
    act_order: bool = field(default=False, compare=False)
    symmetric: bool = field(default=False, compare=False)

    @property
    def is_packed(self) -> bool:
        return self.method in _PACKED

    def inputs_per_group(self, inputs: int) -> int:
        """Return the number of inputs that share a scale in a layer with ``inputs`` inputs."""
        return inputs if self.group_size == -1 else self.group_size

    def __str__(self) -> str:
        if not self.is_packed:
            return f"{_TITLES[self.method]} by bitsandbytes"
        groups = "one group per row" if self.group_size == -1 else f"groups of {self.group_size}"
        return f"{_TITLES[self.method]}, {self.bits} bits, {groups}"


def find_quantization(folder: Path) -> Quantization | None:
    """Return how a checkpoint is quantised, from ``config.json`` or the older files of auto-gptq and AutoAWQ.

    The older files are ``quantize_config.json`` and ``quant_config.json``. ``None`` if the weights are not quantised or
    there is no config.json.

    Raises:
        ConfigError: a file that cannot be read, or an unsupported method, format or number of bits.
    """
    file = folder / "config.json"
    config = text_config(_load(file))
    if isinstance(quantization := config.get("quantization_config"), dict):
        return _parse(quantization, file, str(quantization.get("quant_method", "")).lower())
    for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        if config and (quantization := _load(folder / name)):
            return _parse(quantization, folder / name, str(quantization.get("quant_method", method)).lower())
    return None


def load_base_quantization(folder: Path) -> Quantization | None:
    """Return how the base of an adapter was quantised in training; ``None`` if it was loaded unchanged.

    Raises:
        ConfigError: an unsupported method.
    """
    file = folder / BASE_QUANTIZATION
    config = _load(file)
    return _parse(config, file, str(config.get("quant_method", "")).lower()) if config else None


def _load(file: Path) -> dict[str, Any]:
    return load_json(file) if is_file(file) else {}


def check_bitsandbytes(needed_by: str) -> None:
    """Raise ``ConfigError`` unless bitsandbytes is installed; does not import it."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"{needed_by} needs bitsandbytes, which is not installed",
            f"Install it: {pip_command('requirements_qlora.txt')}",
        )


def _parse(config: dict[str, Any], file: Path, method: str) -> Quantization:
    widths = [bool(config.get(key)) for key in ("load_in_4bit", "load_in_8bit")]
    if method == "bitsandbytes" or any(widths):
        if sum(widths) != 1:
            which = "both" if all(widths) else "neither"
            what = f"{file}: quantised by bitsandbytes with {which} of load_in_4bit and load_in_8bit"
            raise ConfigError(what, "Copy it again from the original checkpoint")
        if config.get("load_in_8bit"):
            return Quantization("int8", 8)
        return Quantization("nf4" if config.get("bnb_4bit_quant_type") == "nf4" else "fp4", 4)
    # The first configs of auto-gptq do not name their method; AutoAWQ has its own names for the numbers.
    if method not in _PACKED and not (method == "" and "bits" in config):
        what = f"{file}: weights quantised by {method or 'an unnamed method'} cannot be read"
        raise ConfigError(what, _USE_UNQUANTISED if method == "fp8" else _USE_ANOTHER)
    bits, group_size = (_number(config, keys, file) for keys in (("bits", "w_bit"), ("group_size", "q_group_size")))
    if method == "awq":
        layout = str(config.get("version") or config.get("checkpoint_format") or config.get("format") or "gemm").lower()
        if layout != "gemm":
            raise ConfigError(f"{file}: AWQ weights in the layout {layout!r} cannot be read, only 'gemm'", _USE_ANOTHER)
        _check_bits(bits, (4,), file)
        return Quantization("awq", bits, group_size, file_name=_file_name(config))
    layout = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
    if layout not in ("gptq", "gptq_v2"):
        raise ConfigError(f"{file}: GPTQ weights in the layout {layout!r} cannot be read", _USE_ANOTHER)
    _check_bits(bits, (2, 4, 8), file)
    act_order = bool(config.get("desc_act")) and group_size != -1
    return Quantization("gptq", bits, group_size, int(layout == "gptq"), _file_name(config), act_order)


def _number(config: dict[str, Any], keys: tuple[str, ...], file: Path) -> int:
    value = next((config[key] for key in keys if key in config), None)
    if not isinstance(value, int) or isinstance(value, bool) or (value < 1 and value != -1):
        raise ConfigError(f"{file}: {keys[0]} is {json.dumps(value)}", "Copy it again from the original checkpoint")
    return value


def _check_bits(bits: int, supported: tuple[int, ...], file: Path) -> None:
    if bits not in supported:
        raise ConfigError(f"{file}: {bits} bits cannot be read, only {' or '.join(map(str, supported))}", _USE_ANOTHER)


def _file_name(config: dict[str, Any]) -> str | None:
    """The weights' file name without suffix; a path that leads out of the folder is ignored."""
    name = config.get("model_file_base_name")
    return name if isinstance(name, str) and name not in ("", "model") and Path(name).name == name else None
