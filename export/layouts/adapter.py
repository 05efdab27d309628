"""LoRA adapters of Qwen v1 as adapters of the same model in Qwen2's layout, and back: their effect stays what it is.

To Qwen2's layout the LoRA of ``c_attn`` is divided: A serves q, k and v, B's rows are theirs. Back three LoRAs with
one A become one of the same rank; others are stacked, B block by block, which adds their ranks up.

Shapes: H hidden size, R rank; A [R, I], B [O, R]; a magnitude (DoRA) and a bias are [O].
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from checkpoints.adapter import PREFIX, Adapter, Edit
from errors import ConfigError
from export.layouts.qwen2_names import Layout, layout_of_names, module_in_qwen, modules_in_qwen2

# What peft calls the tensor of a role, behind the module's name.
_ENDINGS = {
    "lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_bias": "lora_B.bias",
    "embedding_A": "lora_embedding_A", "embedding_B": "lora_embedding_B", "magnitude": "lora_magnitude_vector",
    "rows": "token_adapter.trainable_tokens_delta",
}  # fmt: skip
QkvEdits = Sequence[Edit | None]
"""What becomes of q, k and v, in this order."""


@dataclass(frozen=True)
class Lora:
    """The rank of a module's LoRA, and the factor of its product."""

    rank: int
    scale: float


@dataclass
class ConvertedAdapter:
    """An adapter under other names.

    Attributes:
        tensors: by the names that peft reads; several may be one tensor.
        loras: of the modules that have one, by the module's name.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    loras: dict[str, Lora] = field(default_factory=dict)

    def add(self, module: str, parameter: str, role: str, source: str, tensor: Tensor) -> None:
        """Put a tensor in its place; ``source`` is what it was called before."""
        ending = _ENDINGS.get(role)
        if ending is None:  # biases lie in the layer that LoRA wraps, whole modules do not
            ending = f"base_layer.{parameter}" if f".base_layer.{parameter}" in source else parameter
        self.tensors[f"{PREFIX}{module}.{ending}"] = tensor.contiguous()


def convert_adapter_tensors(adapter: Adapter, layout: Layout) -> ConvertedAdapter:
    """The tensors of an adapter for the same base in another layout.

    Raises:
        ConfigError: names that are not of the other layout, or a change of q, k or v alone that ``c_attn`` cannot have
            without the base's values.
    """
    found = layout_of_names(adapter.edits)
    if found is None or found == layout:
        what = (
            f"{adapter.folder}: by its names the adapter is {'for any layout' if found is None else f'{found} already'}"
        )
        raise ConfigError(what, "There is nothing to convert")
    converted = ConvertedAdapter()
    if layout == "qwen2":
        for parameter, edit in adapter.edits.items():
            _divide(adapter, parameter, edit, converted)
        return converted
    joined: dict[str, list[Edit | None]] = {}
    for parameter, edit in adapter.edits.items():
        module, _, part = parameter.rpartition(".")
        earlier = module_in_qwen(module)
        if earlier is None:
            raise _no_place(adapter, edit, "Qwen v1")
        new, third = earlier
        if third is None:
            _rename(adapter, new, part, edit, converted)
        else:
            joined.setdefault(f"{new}.{part}", [None, None, None])[third] = edit
    for parameter, thirds in joined.items():
        _join(adapter, parameter, thirds, converted)
    return converted


def _no_place(adapter: Adapter, edit: Edit, layout: str) -> ConfigError:
    name = next(iter(edit.roles.values()))
    return ConfigError(f"{adapter.folder}: {name} has no place in the layout of {layout}", "Keep the layout it has")


def _rename(adapter: Adapter, module: str, part: str, edit: Edit, converted: ConvertedAdapter) -> None:
    for role, source in edit.roles.items():
        converted.add(module, part, role, source, adapter.tensors.read(source))
    if edit.roles.keys() & {"lora_A", "embedding_A"}:
        converted.loras[module] = Lora(edit.rank, edit.scale)


def _divide(adapter: Adapter, parameter: str, edit: Edit, converted: ConvertedAdapter) -> None:
    """An edit of Qwen v1's in Qwen2's layout: everything but A has the layer's outputs in its rows."""
    module, _, part = parameter.rpartition(".")
    later = modules_in_qwen2(module)
    if not later:
        raise _no_place(adapter, edit, "Qwen2")
    if len(later) == 1:
        _rename(adapter, later[0], part, edit, converted)
        return
    for role, source in edit.roles.items():
        tensor = adapter.tensors.read(source)
        if role != "lora_A" and len(tensor) % 3:
            what = f"{adapter.folder}: {source} has {len(tensor)} rows, which q, k and v cannot share"
            raise ConfigError(what, "The adapter is not one of Qwen v1")
        for index, new in enumerate(later):
            third = tensor if role == "lora_A" else tensor.chunk(3)[index]
            converted.add(new, part, role, source, third)
            if role == "lora_A":
                converted.loras[new] = Lora(edit.rank, edit.scale)


def _join(adapter: Adapter, parameter: str, thirds: QkvEdits, converted: ConvertedAdapter) -> None:
    """Edits of weight or bias of q, k and v as one of ``c_attn``'s."""
    module, _, part = parameter.rpartition(".")
    for role in dict.fromkeys(role for edit in thirds if edit for role in edit.roles):
        found = {index: (edit, edit.roles[role]) for index, edit in enumerate(thirds) if edit and role in edit.roles}
        source = next(iter(found.values()))[1]
        if role == "lora_A":
            _join_lora(adapter, module, thirds, converted)
        elif role == "lora_bias":
            # It is multiplied with the factor, too; a layer whose B has no bias has one of zeros.
            scale = next(iter(found.values()))[0].scale
            parts = {i: _times(adapter.tensors.read(name), edit.scale / scale) for i, (edit, name) in found.items()}
            size = _common_size(adapter, module, parts.values())
            zeros = torch.zeros(size, dtype=next(iter(parts.values())).dtype)
            converted.add(module, part, role, source, torch.cat([parts.get(i, zeros) for i in range(3)]))
        elif role in ("magnitude", "replacement"):
            if len(found) < 3:
                what = (
                    f"{adapter.folder}: {source} has no counterpart in all of q, k and v, and the base's is not at hand"
                )
                raise ConfigError(what, "Keep the layout it has, or merge it into its base")
            converted.add(module, part, role, source, torch.cat([adapter.tensors.read(found[i][1]) for i in range(3)]))
        elif role != "lora_B":
            raise _no_place(adapter, found[0][0], "Qwen v1")


def _join_lora(adapter: Adapter, module: str, thirds: QkvEdits, converted: ConvertedAdapter) -> None:
    found = [(index, edit) for index, edit in enumerate(thirds) if edit and "lora_A" in edit.roles]
    scale = found[0][1].scale
    downs = [adapter.tensors.read(edit.roles["lora_A"]) for _, edit in found]
    ups = [_times(adapter.tensors.read(edit.roles["lora_B"]), edit.scale / scale) for _, edit in found]
    size = _common_size(adapter, module, ups)
    is_shared = all(torch.equal(down, downs[0]) for down in downs)
    rank = len(downs[0]) if is_shared else sum(map(len, downs))
    joined = torch.zeros(3 * size, rank, dtype=torch.promote_types(ups[0].dtype, ups[-1].dtype))
    column = 0
    for (index, _), up in zip(found, ups, strict=True):
        joined[index * size : (index + 1) * size, column : column + up.shape[1]] = up
        column += 0 if is_shared else up.shape[1]
    converted.add(module, "weight", "lora_A", "", downs[0] if is_shared else torch.cat(downs))
    converted.add(module, "weight", "lora_B", "", joined)
    converted.loras[module] = Lora(rank, scale)


def _common_size(adapter: Adapter, module: str, tensors: Iterable[Tensor]) -> int:
    """The number of rows, which q, k and v have to have in common."""
    sizes = {len(tensor) for tensor in tensors}
    if len(sizes) > 1:
        what = f"{adapter.folder}: q, k and v have different sizes ({sorted(sizes)}), {module} has one for all"
        raise ConfigError(what, "Qwen v1's layout has as many key-value heads as heads: keep the layout it has")
    return sizes.pop()


def _times(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1 else tensor.to(torch.float32) * factor
