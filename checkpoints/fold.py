"""Base + adapter -> merged tensors, one at a time: computed in fp32 and cast once, without building the model.

In fp32 the numbers are those of peft's ``merge_and_unload``, except where a base with tied embeddings got different
changes for its embedding and its head: there the merged checkpoint does what the model with its adapter does (it is
untied), while peft merges both changes into the shared tensor.

Shapes: a linear weight is [O, I], an embedding [V, H]; R is a rank, N a number of trained tokens.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from checkpoints.adapter import Adapter, Edit
from checkpoints.shards import CheckpointReader
from errors import ConfigError

logger = logging.getLogger(__name__)

EMBEDDINGS = ("transformer.wte.weight", "model.embed_tokens.weight")
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Fold:
    """A merged checkpoint, not computed yet. Made by :func:`plan_fold`.

    Attributes:
        names: the merged checkpoint's tensors, in the base's order.
        untied: the base shares embedding and head, the merged checkpoint stores both
            (its config has to say ``tie_word_embeddings: false``).
    """

    base: CheckpointReader
    adapter: Adapter
    names: list[str]
    embedding: str | None
    untied: bool

    @property
    def changed(self) -> list[str]:
        """The names of the tensors that the adapter changes."""
        return [name for name in self.names if name in self.adapter.edits]

    def dtype(self, name: str, dtype: torch.dtype | None = None) -> torch.dtype:
        """The dtype that ``name`` is written in: the base's, or ``dtype`` if one is given and the base's is a float."""
        stored = self.base.dtype(self._source(name))
        return dtype if dtype is not None and stored.is_floating_point else stored

    def nbytes(self, name: str, dtype: torch.dtype | None = None) -> int:
        """The size that ``name`` is written with."""
        return math.prod(self.base.shape(self._source(name))) * self.dtype(name, dtype).itemsize

    def tensors(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """Compute the merged tensors one by one, as (name, tensor).

        Raises:
            ConfigError: a changed or cast tensor is not finite.
        """
        for name in self.names:
            source, target = self._source(name), self.dtype(name, dtype)
            edit = self.adapter.edits.get(name)
            merged = (self._folded(source, edit) if edit else self.base.read(source)).to(target)
            if (edit or target != self.base.dtype(source)) and not _is_finite(merged):
                what = f"{name} is not finite after merging and casting to {str(target).removeprefix('torch.')}"
                raise ConfigError(what, "Try --dtype bf16 or fp32; if that fails too, the base is damaged")
            yield name, merged

    def _source(self, name: str) -> str:
        """The base's tensor that ``name`` starts from."""
        return self.embedding if self.embedding and self.untied and name == HEAD else name

    def _folded(self, source: str, edit: Edit) -> Tensor:
        """One changed tensor, in fp32."""
        roles, read = edit.roles, self.adapter.read
        start = self.adapter.tensors.read(roles["replacement"]) if "replacement" in roles else self.base.read(source)
        value = start.to(torch.float32, copy=True)
        if "lora_A" in roles:
            value.addmm_(read(edit, "lora_B"), read(edit, "lora_A"), alpha=edit.scale)
            if "magnitude" in roles:
                value.mul_((read(edit, "magnitude") / torch.linalg.norm(value, dim=1))[:, None])
        if "embedding_A" in roles:
            value.addmm_(read(edit, "embedding_A").T, read(edit, "embedding_B").T, alpha=edit.scale)
            if "magnitude" in roles:
                value.mul_(read(edit, "magnitude") / torch.linalg.norm(value, dim=0))
        if "lora_bias" in roles:
            value.add_(read(edit, "lora_bias"), alpha=edit.scale)
        if "rows" in roles:
            value[torch.tensor(edit.row_indices)] = read(edit, "rows")
        return value


def plan_fold(base: CheckpointReader, base_config: Mapping[str, Any], adapter: Adapter) -> Fold:
    """Check that an adapter fits a base, and say what the merged checkpoint will hold.

    All checks that need no merged tensor happen here, before anything is written. An adapter that lacks tensors it was
    trained with is merged with a loud warning.

    Args:
        base: the base's tensors; of a quantised one as :class:`checkpoints.dequantized.DequantizedReader` has them.
        base_config: the base's config.json.
    Raises:
        ConfigError: a tensor of the adapter that fits no tensor of the base or is not finite.
    """
    embedding = next((name for name in EMBEDDINGS if name in base), None)
    tied = embedding is not None and bool(base_config.get("tie_word_embeddings", HEAD not in base))
    # A tied checkpoint may store its head all the same, but no loader takes that copy.
    names = [name for name in base.names() if not (tied and name == HEAD)]
    shapes_from = {name: name for name in names} | ({HEAD: embedding} if tied and embedding else {})
    for parameter, edit in adapter.edits.items():
        if parameter not in shapes_from:
            what = f"{adapter.folder}: {next(iter(edit.roles.values()))} fits no tensor of the base"
            raise ConfigError(what, "Give the base that the adapter was trained on")
        _check_shapes(parameter, edit, base.shape(shapes_from[parameter]), adapter)
    _check_finite(adapter)
    _warn_of_missing(adapter, list(shapes_from), tied)
    untied = tied and embedding is not None and _unties(adapter, embedding)
    if untied:
        names.append(HEAD)
    return Fold(base, adapter, names, embedding, untied)


def _check_shapes(parameter: str, edit: Edit, shape: tuple[int, ...], adapter: Adapter) -> None:
    if len(shape) != 2 and not edit.roles.keys() <= {"replacement", "lora_bias"}:
        what = f"{adapter.folder}: {parameter} has shape {shape}"
        raise ConfigError(what, "LoRA and trained tokens are merged into matrices only")
    outputs, inputs = shape[0], shape[-1]
    expected = {
        "replacement": shape,
        "lora_A": (edit.rank, inputs),
        "lora_B": (outputs, edit.rank),
        "embedding_A": (edit.rank, outputs),
        "embedding_B": (inputs, edit.rank),
        "magnitude": (inputs if "embedding_A" in edit.roles else outputs,),
        "lora_bias": shape,
        "rows": (len(edit.row_indices), inputs),
    }
    for role, name in edit.roles.items():
        if (found := adapter.tensors.shape(name)) != expected[role]:
            what = f"{adapter.folder}: {name} has shape {found}, base and adapter_config.json ask for {expected[role]}"
            raise ConfigError(what, "Give the base that the adapter was trained on")
    if edit.row_indices and not 0 <= min(edit.row_indices) <= max(edit.row_indices) < outputs:
        what = f"{adapter.folder}: trainable_token_indices has ids outside of 0..{outputs - 1}, the rows of {parameter}"
        raise ConfigError(what, "Give the base that the adapter was trained on")


def _check_finite(adapter: Adapter) -> None:
    for name in adapter.tensors.names():
        if not _is_finite(adapter.tensors.read(name)):
            raise ConfigError(f"{adapter.folder}: {name} holds NaN or infinity", "The training failed: train again")


def _is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; unlike ``isfinite().all()`` it makes no tensor of the same size."""
    return tensor.numel() == 0 or all(bool(extreme.isfinite()) for extreme in torch.aminmax(tensor))


def _warn_of_missing(adapter: Adapter, parameters: list[str], tied: bool) -> None:
    """Warn of what was trained according to the adapter's config but is not in its file."""
    config, edits = adapter.config, adapter.edits
    modules = config.get("modules_to_save") or []
    replaced = {name for name, edit in edits.items() if "replacement" in edit.roles}
    lost = [name for name in parameters if name not in replaced and any(f"{module}." in name for module in modules)]

    tokens = config.get("trainable_token_indices") or {}
    with_rows = [name.rpartition(".")[0] for name, edit in edits.items() if "rows" in edit.roles]
    for module in tokens if isinstance(tokens, dict) else [""]:
        # Tied modules share one set of rows; a plain list of tokens means the input embedding, whatever its name.
        if not any(tied or name.endswith(module) for name in with_rows):
            lost.append(f"the trained rows of {module or 'the input embedding'}")
    if not lost:
        return
    listed = ", ".join(lost[:4]) + (f" and {len(lost) - 4} more" if len(lost) > 4 else "")
    logger.warning(
        "THE ADAPTER %s IS INCOMPLETE: its adapter_config.json says that more was trained than its file holds. "
        "Missing: %s. The merged model takes these from the base and will not answer like the model that was trained. "
        "The original Qwen fine-tuning script saved adapters of base models this way; the checkpoint-* folders of the "
        "same training hold everything: merge one of those, or train again.",
        adapter.folder,
        listed,
    )


def _unties(adapter: Adapter, embedding: str) -> bool:
    """Whether the embedding and the head of a tied base differ once the adapter is merged.

    Trained tokens of the embedding serve the head too, unless the head was trained itself. Any other change acts on the
    module it was saved for: with ``ensure_weight_tying`` peft saves it for both, without it the head stays the base's.
    """
    first, second = adapter.edits.get(embedding), adapter.edits.get(HEAD)
    if second is None:
        return first is not None and first.roles.keys() != {"rows"}
    return first is None or not _same_change(adapter, first, second)


def _same_change(adapter: Adapter, embedding: Edit, head: Edit) -> bool:
    """Whether two edits of one [V, H] tensor do the same, one made for an embedding, the other for a linear layer."""
    swapped = {"lora_A": "embedding_B", "lora_B": "embedding_A"}
    if {swapped.get(role, role) for role in head.roles} != embedding.roles.keys() or "magnitude" in head.roles:
        return False
    if (head.scale, head.row_indices) != (embedding.scale, embedding.row_indices):
        return False
    for role in head.roles:
        change, other = adapter.read(head, role), adapter.read(embedding, swapped.get(role, role))
        if not torch.equal(change, other.T if role in swapped else other):
            return False
    return True
