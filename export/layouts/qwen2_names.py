"""Names of Qwen v1's modules in Qwen2's layout, and back.

One Qwen v1 layer has three counterparts: the rows of ``c_attn`` are those of Qwen2's ``q_proj``, ``k_proj`` and
``v_proj``, in this order, one third each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

Layout = Literal["qwen", "qwen2"]
LAYOUTS: tuple[Layout, ...] = ("qwen", "qwen2")

C_ATTN = "attn.c_attn"
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
"""Counterparts of ``c_attn``, in the order of their rows in it."""

# Modules outside the blocks, and within a block: Qwen v1 -> Qwen2.
_OUTSIDE = {"transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm", "lm_head": "lm_head"}
_WITHIN = {
    "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm", "attn": "self_attn", "mlp": "mlp",
    "attn.c_proj": "self_attn.o_proj", "mlp.w1": "mlp.up_proj", "mlp.w2": "mlp.gate_proj",
    "mlp.c_proj": "mlp.down_proj",
}  # fmt: skip
_OUTSIDE_TO_QWEN = {qwen2: qwen for qwen, qwen2 in _OUTSIDE.items()}
_WITHIN_TO_QWEN = {qwen2: qwen for qwen, qwen2 in _WITHIN.items()}

_QWEN_BLOCK = re.compile(r"transformer\.h\.(\d+)\.(.+)")
_QWEN2_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)")


def layout_of_names(names: Iterable[str]) -> Layout | None:
    """Return the layout that names of tensors or modules belong to; ``None`` if they fit any layout.

    Names of Qwen3 count as ``qwen2``, which they share.
    """
    for name in names:
        if name.startswith("transformer."):
            return "qwen"
        if name.startswith("model."):
            return "qwen2"
    return None


def layout_of_config(config: Mapping[str, Any]) -> Layout:
    """Return the layout of a config's ``model_type``. Every family but Qwen v1 counts as ``qwen2``."""
    return "qwen" if config.get("model_type") == "qwen" else "qwen2"


def modules_in_qwen2(module: str) -> tuple[str, ...]:
    """Return the names in Qwen2's layout of a module's full name: three for ``c_attn``, none without a counterpart."""
    if (match := _QWEN_BLOCK.fullmatch(module)) is None:
        return (_OUTSIDE[module],) if module in _OUTSIDE else ()
    number, within = match.groups()
    names = QKV if within == C_ATTN else (_WITHIN[within],) if within in _WITHIN else ()
    return tuple(f"model.layers.{number}.{name}" for name in names)


def module_in_qwen(module: str) -> tuple[str, int | None] | None:
    """Return the name in Qwen v1's layout of a module's full name; ``None`` without a counterpart.

    The second value is the module's index (0, 1, 2) among the thirds of ``c_attn``; ``None`` for every other module.
    """
    if (match := _QWEN2_BLOCK.fullmatch(module)) is None:
        return (_OUTSIDE_TO_QWEN[module], None) if module in _OUTSIDE_TO_QWEN else None
    number, within = match.groups()
    if within in QKV:
        return f"transformer.h.{number}.{C_ATTN}", QKV.index(within)
    return (f"transformer.h.{number}.{_WITHIN_TO_QWEN[within]}", None) if within in _WITHIN_TO_QWEN else None


def convert_suffix(layout: Layout, suffix: str) -> tuple[str, ...]:
    """Return the suffixes in ``layout`` that match the modules that ``suffix`` matches in the other layout.

    Configs name modules by the end of their names: ``c_proj`` becomes ``o_proj`` and ``down_proj`` in Qwen2's layout,
    ``h.3.attn.c_proj`` becomes ``layers.3.self_attn.o_proj``. Empty if no module matches.
    """
    stems, suffixes = (_STEMS, _SUFFIXES) if layout == "qwen2" else (_STEMS_TO_QWEN, _SUFFIXES_TO_QWEN)
    match = re.fullmatch(r"((?:\w+\.)*?\d+\.)?(.+)", suffix)
    block, rest = match.groups("") if match else ("", suffix)
    block = ".".join(stems.get(part, part) for part in block.split("."))
    return tuple(block + name for name in suffixes.get(rest, ()))


def _suffixes(path: str) -> Iterator[str]:
    parts = path.split(".")
    for start in range(len(parts)):
        yield ".".join(parts[start:])


def _convert_all_suffixes(names: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Map every suffix of a name to the shortest suffixes of its counterparts that match no other module."""
    counterparts = {other for others in names.values() for other in others}

    def shortest(name: str, depth: int) -> str:
        # peft matches suffixes within a word too: "norm" would match the norms of every layer.
        candidates = [suffix for suffix in _suffixes(name) if suffix.count(".") >= depth]
        unique = [suffix for suffix in candidates if sum(other.endswith(suffix) for other in counterparts) == 1]
        return (unique or candidates[:1])[-1]

    converted: dict[str, dict[str, None]] = {}  # dicts as ordered sets
    for name, others in names.items():
        for suffix in _suffixes(name):
            converted.setdefault(suffix, {}).update((shortest(other, suffix.count(".")), None) for other in others)
    return {suffix: tuple(others) for suffix, others in converted.items()}


_STEMS = {"transformer": "model", "h": "layers"}
_STEMS_TO_QWEN = {qwen2: qwen for qwen, qwen2 in _STEMS.items()}
_SUFFIXES = _convert_all_suffixes({name: (other,) for name, other in (_OUTSIDE | _WITHIN).items()} | {C_ATTN: QKV})
_SUFFIXES_TO_QWEN = _convert_all_suffixes(
    {name: (other,) for name, other in (_OUTSIDE_TO_QWEN | _WITHIN_TO_QWEN).items()} | dict.fromkeys(QKV, (C_ATTN,))
)
