"""What Qwen v1's modules are called in Qwen2's layout, and back.

One layer of Qwen v1 has no single counterpart: the rows of ``c_attn`` are those of Qwen2's ``q_proj``, ``k_proj`` and
``v_proj``, one third each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

Layout = Literal["qwen", "qwen2"]
LAYOUTS: tuple[Layout, ...] = ("qwen", "qwen2")

C_ATTN = "attn.c_attn"
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
"""The thirds of ``c_attn``, in the order of their rows."""

# Modules outside of the blocks, and within a block.
_OUTSIDE = {"transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm", "lm_head": "lm_head"}
_WITHIN = {
    "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm", "attn": "self_attn", "mlp": "mlp",
    "attn.c_proj": "self_attn.o_proj", "mlp.w1": "mlp.up_proj", "mlp.w2": "mlp.gate_proj",
    "mlp.c_proj": "mlp.down_proj",
}  # fmt: skip
_OUTSIDE_BACK = {later: name for name, later in _OUTSIDE.items()}
_WITHIN_BACK = {later: name for name, later in _WITHIN.items()}

_BLOCK = re.compile(r"transformer\.h\.(\d+)\.(.+)")
_LATER_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)")


def layout_of_names(names: Iterable[str]) -> Layout | None:
    """The layout that tensors or modules have by their names; ``None`` where no name tells.

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
    """A module's full name in Qwen2's layout: three for ``c_attn``, none for what Qwen2 has no place for."""
    if (match := _BLOCK.fullmatch(module)) is None:
        return (_OUTSIDE[module],) if module in _OUTSIDE else ()
    number, within = match.groups()
    later = QKV if within == C_ATTN else (_WITHIN[within],) if within in _WITHIN else ()
    return tuple(f"model.layers.{number}.{name}" for name in later)


def module_in_qwen(module: str) -> tuple[str, int | None] | None:
    """A module's full name in Qwen v1's layout, and the third of it that the module is (``None``: it is all of it).

    ``None`` for what Qwen v1 has no place for.
    """
    if (match := _LATER_BLOCK.fullmatch(module)) is None:
        return (_OUTSIDE_BACK[module], None) if module in _OUTSIDE_BACK else None
    number, within = match.groups()
    if within in QKV:
        return f"transformer.h.{number}.{C_ATTN}", QKV.index(within)
    return (f"transformer.h.{number}.{_WITHIN_BACK[within]}", None) if within in _WITHIN_BACK else None


def endings_in(layout: Layout, ending: str) -> tuple[str, ...]:
    """The names in ``layout`` of all modules that a name's ending means, as configs write it.

    ``c_proj`` in Qwen2's layout is ``o_proj`` and ``down_proj``, ``h.3.attn.c_proj`` is ``layers.3.self_attn.o_proj``.
    Empty for an ending that no module has.
    """
    stems, endings = (_STEMS, _ENDINGS) if layout == "qwen2" else (_STEMS_BACK, _ENDINGS_BACK)
    match = re.fullmatch(r"((?:\w+\.)*?\d+\.)?(.+)", ending)
    block, rest = match.groups("") if match else ("", ending)
    block = ".".join(stems.get(part, part) for part in block.split("."))
    return tuple(block + name for name in endings.get(rest, ()))


def _suffixes(path: str) -> Iterator[str]:
    parts = path.split(".")
    for start in range(len(parts)):
        yield ".".join(parts[start:])


def _endings(paths: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Every ending of a path -> endings of its counterparts, as short as can be while they mean no other module."""
    counterparts = {other for others in paths.values() for other in others}

    def shortest(path: str, depth: int) -> str:
        # peft asks whether a name ends so, also within a word: "norm" would mean every layer's norm.
        fitting = [each for each in _suffixes(path) if each.count(".") >= depth]
        alone = [each for each in fitting if sum(other.endswith(each) for other in counterparts) == 1]
        return (alone or fitting[:1])[-1]

    found: dict[str, dict[str, None]] = {}
    for path, others in paths.items():
        for ending in _suffixes(path):
            found.setdefault(ending, {}).update((shortest(other, ending.count(".")), None) for other in others)
    return {ending: tuple(names) for ending, names in found.items()}


_STEMS = {"transformer": "model", "h": "layers"}
_STEMS_BACK = {later: name for name, later in _STEMS.items()}
_ENDINGS = _endings({name: (later,) for name, later in (_OUTSIDE | _WITHIN).items()} | {C_ATTN: QKV})
_ENDINGS_BACK = _endings(
    {name: (earlier,) for name, earlier in (_OUTSIDE_BACK | _WITHIN_BACK).items()} | dict.fromkeys(QKV, (C_ATTN,))
)
