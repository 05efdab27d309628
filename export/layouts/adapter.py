"""LoRA adapters of Qwen v1 as adapters of the same model in Qwen2's layout, and back, with the same effect.

To Qwen2's layout the LoRA of ``c_attn`` is split: q, k and v each get all of A and their rows of B. Back, three LoRAs
with an equal A become one of the same rank; otherwise they are stacked with a block-diagonal B, and the ranks add up.

Shapes: H hidden size, R rank; A [R, I], B [O, R]; a magnitude (DoRA) and a bias are [O].
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from checkpoints.adapter import Adapter, Edit
from checkpoints.whole import ADAPTER_PREFIX
from errors import ConfigError
from export.layouts.qwen2_names import Layout, layout_of_names, module_in_qwen, modules_in_qwen2

# Role of a tensor -> how peft names it after the module's name.
_SUFFIXES = {
    "lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_bias": "lora_B.bias",
    "embedding_A": "lora_embedding_A", "embedding_B": "lora_embedding_B", "magnitude": "lora_magnitude_vector",
    "rows": "token_adapter.trainable_tokens_delta",
}  # fmt: skip
QkvEdits = Sequence[Edit | None]
"""Edits of q, k and v, in this order; ``None`` for one without an edit."""
_KEEP_LAYOUT = "Keep the adapter's layout"


@dataclass(frozen=True)
class LoraScale:
    """Rank of a module's LoRA, and the factor of its product B A."""

    rank: int
    scale: float


@dataclass
class ConvertedAdapter:
    """An adapter's tensors in another layout.

    Attributes:
        tensors: by the names that peft reads; several names may share one tensor.
        loras: rank and scale by module, for the modules with LoRA.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    loras: dict[str, LoraScale] = field(default_factory=dict)

    def add(self, module: str, parameter: str, role: str, source: str, tensor: Tensor) -> None:
        """Add a tensor under the name of its role; ``source`` is its name in the file it comes from."""
        suffix = _SUFFIXES.get(role)
        if suffix is None:  # a whole parameter: peft keeps biases in the wrapped base layer, saved modules outside it
            suffix = f"base_layer.{parameter}" if f".base_layer.{parameter}" in source else parameter
        self.tensors[f"{ADAPTER_PREFIX}{module}.{suffix}"] = tensor.contiguous()


def convert_adapter_tensors(adapter: Adapter, layout: Layout) -> ConvertedAdapter:
    """Convert an adapter's tensors to the other layout of its base.

    Raises:
        ConfigError: names that do not belong to the other layout, or a change of q, k or v alone that ``c_attn`` can
            only express with the base's values.
    """
    source_layout = layout_of_names(adapter.edits)
    if source_layout is None or source_layout == layout:
        names = "the same in every layout" if source_layout is None else f"those of {source_layout} already"
        raise ConfigError(f"{adapter.folder}: the adapter's names are {names}", "There is nothing to convert")
    converted = ConvertedAdapter()
    if layout == "qwen2":
        for parameter, edit in adapter.edits.items():
            _convert_to_qwen2(adapter, parameter, edit, converted)
        return converted
    qkv_edits: dict[str, list[Edit | None]] = {}
    for parameter, edit in adapter.edits.items():
        module, _, part = parameter.rpartition(".")
        counterpart = module_in_qwen(module)
        if counterpart is None:
            raise _no_counterpart(adapter, edit, "Qwen v1")
        new, qkv_index = counterpart
        if qkv_index is None:
            _rename(adapter, new, part, edit, converted)
        else:
            qkv_edits.setdefault(f"{new}.{part}", [None, None, None])[qkv_index] = edit
    for parameter, edits in qkv_edits.items():
        _join(adapter, parameter, edits, converted)
    return converted


def _no_counterpart(adapter: Adapter, edit: Edit, layout: str) -> ConfigError:
    name = next(iter(edit.roles.values()))
    return ConfigError(f"{adapter.folder}: {name} has no counterpart in the layout of {layout}", _KEEP_LAYOUT)


def _rename(adapter: Adapter, module: str, part: str, edit: Edit, converted: ConvertedAdapter) -> None:
    for role, source in edit.roles.items():
        converted.add(module, part, role, source, adapter.tensors.read(source))
    if edit.roles.keys() & {"lora_A", "embedding_A"}:
        converted.loras[module] = LoraScale(edit.rank, edit.scale)


def _convert_to_qwen2(adapter: Adapter, parameter: str, edit: Edit, converted: ConvertedAdapter) -> None:
    """Rename one edit, or split it among q, k and v: every tensor but A has the layer's outputs in its rows."""
    module, _, part = parameter.rpartition(".")
    new_modules = modules_in_qwen2(module)
    if not new_modules:
        raise _no_counterpart(adapter, edit, "Qwen2")
    if len(new_modules) == 1:
        _rename(adapter, new_modules[0], part, edit, converted)
        return
    for role, source in edit.roles.items():
        tensor = adapter.tensors.read(source)
        if role != "lora_A" and len(tensor) % 3:
            what = f"{adapter.folder}: {source} has {len(tensor)} rows, which cannot be split among q, k and v"
            raise ConfigError(what, "This is not an adapter of Qwen v1")
        for index, new in enumerate(new_modules):
            third = tensor if role == "lora_A" else tensor.chunk(3)[index]
            converted.add(new, part, role, source, third)
            if role == "lora_A":
                converted.loras[new] = LoraScale(edit.rank, edit.scale)


def _join(adapter: Adapter, parameter: str, edits: QkvEdits, converted: ConvertedAdapter) -> None:
    """Join the edits of the weights, or of the biases, of q, k and v into one edit of ``c_attn``."""
    module, _, part = parameter.rpartition(".")
    for role in dict.fromkeys(role for edit in edits if edit for role in edit.roles):
        present = {index: (edit, edit.roles[role]) for index, edit in enumerate(edits) if edit and role in edit.roles}
        first_edit, source = next(iter(present.values()))
        if role == "lora_A":
            _join_lora(adapter, module, edits, converted)
        elif role == "lora_bias":
            # The bias of B is scaled as well, here to the first one's scale; a B without a bias gets zeros.
            scale = first_edit.scale
            parts = {i: _times(adapter.tensors.read(name), edit.scale / scale) for i, (edit, name) in present.items()}
            size = _common_size(adapter, module, parts.values())
            zeros = torch.zeros(size, dtype=next(iter(parts.values())).dtype)
            converted.add(module, part, role, source, torch.cat([parts.get(i, zeros) for i in range(3)]))
        elif role in ("magnitude", "replacement"):
            if len(present) < 3:
                what = f"{adapter.folder}: {source} has no counterpart in all of q, k and v, and the base is not read"
                raise ConfigError(what, f"{_KEEP_LAYOUT}, or merge it into its base")
            joined = torch.cat([adapter.tensors.read(present[i][1]) for i in range(3)])
            converted.add(module, part, role, source, joined)
        elif role != "lora_B":  # joined with lora_A
            raise _no_counterpart(adapter, present[0][0], "Qwen v1")


def _join_lora(adapter: Adapter, module: str, edits: QkvEdits, converted: ConvertedAdapter) -> None:
    present = [(index, edit) for index, edit in enumerate(edits) if edit and "lora_A" in edit.roles]
    scale = present[0][1].scale
    downs = [adapter.tensors.read(edit.roles["lora_A"]) for _, edit in present]
    ups = [_times(adapter.tensors.read(edit.roles["lora_B"]), edit.scale / scale) for _, edit in present]
    size = _common_size(adapter, module, ups)
    is_shared = all(torch.equal(down, downs[0]) for down in downs)
    rank = len(downs[0]) if is_shared else sum(map(len, downs))
    joined = torch.zeros(3 * size, rank, dtype=torch.promote_types(ups[0].dtype, ups[-1].dtype))
    column = 0
    for (index, _), up in zip(present, ups, strict=True):
        joined[index * size : (index + 1) * size, column : column + up.shape[1]] = up
        column += 0 if is_shared else up.shape[1]
    converted.add(module, "weight", "lora_A", "", downs[0] if is_shared else torch.cat(downs))
    converted.add(module, "weight", "lora_B", "", joined)
    converted.loras[module] = LoraScale(rank, scale)


def _common_size(adapter: Adapter, module: str, tensors: Iterable[Tensor]) -> int:
    """Return the number of rows that the tensors of q, k and v share; raise ConfigError if they differ."""
    sizes = {len(tensor) for tensor in tensors}
    if len(sizes) > 1:
        what = f"{adapter.folder}: q, k and v have different sizes ({sorted(sizes)}), {module} has one for all"
        raise ConfigError(what, f"Qwen v1's layout has as many key-value heads as heads. {_KEEP_LAYOUT}")
    return sizes.pop()


def _times(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1 else tensor.to(torch.float32) * factor
