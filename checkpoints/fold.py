"""Merge adapters into their base: computed in float32, some rows at a time, without building the model.

The result equals that of peft's ``merge_and_unload``, except if an adapter changes the embedding and the head of a tied
base differently: the merged checkpoint is then untied and computes what the model with its adapter computes, while
peft merges both changes into the shared tensor.

Shapes: a linear weight is [O, I], an embedding [V, H]; R is a rank, N a number of trained tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from checkpoints.adapter import Adapter, Edit
from checkpoints.source import TensorSource, row_blocks
from errors import ConfigError
from qwen_model.architectures import EMBEDDING_WEIGHTS, HEAD_WEIGHT

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WeightedAdapter:
    """An adapter and the factor of its change: 1 applies it as trained."""

    adapter: Adapter
    weight: float = 1.0


class Fold(TensorSource):
    """A merged checkpoint, computed when it is read: ``W + sum over adapters of weight * (W_adapter - W)``.

    ``W_adapter`` is the tensor merged with that adapter alone. Built by :func:`plan_fold`.

    Attributes:
        moved: names of the tensors read so far whose values are not all the base's.
        untied: the base shares embedding and head, but the merged checkpoint stores both; its config must contain
            ``tie_word_embeddings: false``.
    """

    def __init__(
        self,
        base: TensorSource,
        adapters: Sequence[WeightedAdapter],
        names: list[str],
        embedding: str | None,
        untied: bool,
    ) -> None:
        self.base, self.adapters, self.untied = base, adapters, untied
        self.moved: set[str] = set()
        self._names, self._embedding = dict.fromkeys(names), embedding
        self._norms: dict[tuple[str, int], Tensor] = {}

    @property
    def changed(self) -> list[str]:
        """The names of the tensors that an adapter has values for."""
        return [name for name in self._names if self._edits(name)]

    def before(self) -> Fold:
        """Return the tensors as they are without the adapters, under the same names."""
        return Fold(self.base, (), list(self._names), self._embedding, self.untied)

    def names(self) -> list[str]:
        return list(self._names)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(self._source(name))

    def dtype(self, name: str) -> torch.dtype:
        return self.base.dtype(self._source(name))

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        source, edits = self._source(name), self._edits(name)
        if not edits:
            return self.base.rows(source, start, stop)
        window = slice(*slice(start, stop).indices(self.shape(name)[0]))
        plain = self.base.rows(source, window.start, window.stop)
        if [weighted.weight for weighted, _ in edits] == [1.0]:
            merged = self._edited(source, *edits[0], window)
        else:
            # The changes are summed first, so that opposite ones cancel exactly.
            plain = plain.to(torch.float32)
            merged = torch.zeros_like(plain)
            for weighted, edit in edits:
                merged.add_(self._edited(source, weighted, edit, window).sub_(plain), alpha=weighted.weight)
            merged.add_(plain)
        if name not in self.moved and not torch.equal(merged, plain.to(torch.float32)):
            self.moved.add(name)
        return merged

    def _source(self, name: str) -> str:
        """The base's tensor that is changed into ``name``: for an untied head the embedding."""
        return self._embedding if self._embedding and self.untied and name == HEAD_WEIGHT else name

    def _edits(self, name: str) -> list[tuple[WeightedAdapter, Edit]]:
        edits = []
        for weighted in self.adapters:
            edit = weighted.adapter.edits.get(name)
            if edit is None and self._source(name) != name:  # rows trained for a tied embedding apply to the head too
                shared = weighted.adapter.edits.get(self._source(name))
                edit = shared if shared is not None and shared.roles.keys() == {"rows"} else None
            if edit is not None:
                edits.append((weighted, edit))
        return edits

    def _edited(self, source: str, weighted: WeightedAdapter, edit: Edit, window: slice) -> Tensor:
        """Rows of a tensor merged with one adapter at weight 1, in float32."""
        adapter, roles = weighted.adapter, edit.roles
        if "replacement" in roles:
            value = adapter.tensors.rows(roles["replacement"], window.start, window.stop)
        else:
            value = self.base.rows(source, window.start, window.stop)
        value = value.to(torch.float32, copy=True)
        if "lora_A" in roles:
            value.addmm_(adapter.read(edit, "lora_B")[window], adapter.read(edit, "lora_A"), alpha=edit.scale)
            if "magnitude" in roles:
                value.mul_((adapter.read(edit, "magnitude")[window] / torch.linalg.norm(value, dim=1))[:, None])
        if "embedding_A" in roles:
            self._add_to_embedding(value, adapter, edit, window)
            if "magnitude" in roles:
                value.mul_(adapter.read(edit, "magnitude") / self._column_norms(source, adapter, edit))
        if "lora_bias" in roles:
            value.add_(adapter.read(edit, "lora_bias")[window], alpha=edit.scale)
        if "rows" in roles:
            for row, trained in zip(edit.row_indices, adapter.read(edit, "rows"), strict=True):
                if window.start <= row < window.stop:
                    value[row - window.start] = trained
        return value

    def _add_to_embedding(self, value: Tensor, adapter: Adapter, edit: Edit, window: slice) -> None:
        factor = adapter.read(edit, "embedding_A")[:, window]
        value.addmm_(factor.T, adapter.read(edit, "embedding_B").T, alpha=edit.scale)

    def _column_norms(self, source: str, adapter: Adapter, edit: Edit) -> Tensor:
        """[H]: norms of an embedding's columns; DoRA takes them over all rows, whichever rows are read."""
        key = (source, id(adapter))
        if key not in self._norms:
            rows, width = self.base.shape(source)
            squares = torch.zeros(width, dtype=torch.float64)
            for start, stop in row_blocks(rows, width):
                value = self.base.rows(source, start, stop).to(torch.float32, copy=True)
                self._add_to_embedding(value, adapter, edit, slice(start, stop))
                squares += value.square().sum(0, dtype=torch.float64)
            self._norms[key] = squares.sqrt().to(torch.float32)
        return self._norms[key]


def plan_fold(base: TensorSource, base_config: Mapping[str, Any], adapters: Sequence[WeightedAdapter]) -> Fold:
    """Check that adapters fit a base, and return the merged checkpoint.

    All checks that need no merged tensor are done here, before anything is written. An adapter that lacks tensors it
    was trained with is merged with a warning.

    Args:
        base: the base's tensors; a quantised base is read with ``checkpoints.dequantized_reader``.
        base_config: the base's config.json; decides whether embedding and head are tied.
        adapters: in the base's layout.
    Raises:
        ConfigError: an adapter's tensor fits no tensor of the base.
    """
    embedding, tied = _embedding(base, base_config)
    # A tied checkpoint may also store its head, but loaders ignore that copy.
    names = [name for name in base.names() if not (tied and name == HEAD_WEIGHT)]
    untied = False
    for adapter in (weighted.adapter for weighted in adapters):
        check_fits(base, base_config, adapter)
        biases = (edit for name, edit in adapter.edits.items() if name.endswith(".bias") and name not in base)
        if bias := next(biases, None):
            what = f"{adapter.folder}: {next(iter(bias.roles.values()))} fits no tensor of the base"
            raise ConfigError(what, "Its layer has no bias to merge it into: use the adapter unmerged (scripts.ask)")
        _warn_of_missing(adapter, [*names, *([HEAD_WEIGHT] if tied else [])], tied)
        untied |= tied and embedding is not None and _unties(adapter, embedding)
    if untied:
        names.append(HEAD_WEIGHT)
    return Fold(base, adapters, names, embedding, untied)


def _embedding(base: TensorSource, base_config: Mapping[str, Any]) -> tuple[str | None, bool]:
    """Return the name of a base's embedding, and whether its head is tied to it."""
    embedding = next((name for name in EMBEDDING_WEIGHTS if name in base), None)
    return embedding, embedding is not None and bool(base_config.get("tie_word_embeddings", HEAD_WEIGHT not in base))


def check_fits(
    base: TensorSource, base_config: Mapping[str, Any], adapter: Adapter, dropped: Container[str] = ()
) -> None:
    """Check that each tensor of an adapter fits a tensor of the base; a LoRA bias may belong to a layer without one.

    Args:
        dropped: names of biases of zeros that quantised files contain and ``base`` does not.

    Raises:
        ConfigError: an unknown name, a wrong shape or dtype.
    """
    embedding, tied = _embedding(base, base_config)

    def stored_name(name: str) -> str:
        return embedding if tied and embedding and name == HEAD_WEIGHT else name

    for parameter, edit in adapter.edits.items():
        source, weight = stored_name(parameter), stored_name(f"{parameter.rpartition('.')[0]}.weight")
        if source in base:
            _check_shapes(parameter, edit, base, source, adapter)
        elif weight in base and (edit.roles.keys() == {"lora_bias"} or source in dropped):
            for name in edit.roles.values():
                _check_tensor(adapter, name, base.shape(weight)[:1])
        else:
            what = f"{adapter.folder}: {next(iter(edit.roles.values()))} fits no tensor of the base"
            raise ConfigError(what, "Give the base that the adapter was trained on")


def _check_shapes(parameter: str, edit: Edit, base: TensorSource, source: str, adapter: Adapter) -> None:
    shape = base.shape(source)
    if not base.dtype(source).is_floating_point:
        what = f"the base's {source} is stored as {str(base.dtype(source)).removeprefix('torch.')}"
        raise ConfigError(what, "Use a base with floating-point weights, or one that config.json declares quantised")
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
        _check_tensor(adapter, name, expected[role])
    if edit.row_indices and not 0 <= min(edit.row_indices) <= max(edit.row_indices) < outputs:
        what = f"{adapter.folder}: trainable_token_indices has ids outside of 0..{outputs - 1}, the rows of {parameter}"
        raise ConfigError(what, "Give the base that the adapter was trained on")


def _check_tensor(adapter: Adapter, name: str, shape: tuple[int, ...]) -> None:
    if not adapter.tensors.dtype(name).is_floating_point:
        what = f"{adapter.folder}: {name} is stored as {str(adapter.tensors.dtype(name)).removeprefix('torch.')}"
        raise ConfigError(what, "Save the adapter again in floating point")
    if (actual := adapter.tensors.shape(name)) != shape:
        what = f"{adapter.folder}: {name} has shape {actual}, base and adapter_config.json ask for {shape}"
        raise ConfigError(what, "Give the base that the adapter was trained on")


def _warn_of_missing(adapter: Adapter, parameters: list[str], tied: bool) -> None:
    """Warn if tensors that were trained according to the adapter's config are not in its file."""
    config, edits = adapter.config, adapter.edits
    modules = config.get("modules_to_save") or []
    replaced = {name for name, edit in edits.items() if "replacement" in edit.roles}
    missing = [name for name in parameters if name not in replaced and any(f"{module}." in name for module in modules)]

    tokens = config.get("trainable_token_indices") or {}
    with_rows = [name.rpartition(".")[0] for name, edit in edits.items() if "rows" in edit.roles]
    for module in tokens if isinstance(tokens, dict) else [""]:
        # Tied modules share one set of rows; a plain list of tokens refers to the input embedding.
        if not any(tied or name.endswith(module) for name in with_rows):
            missing.append(f"the trained rows of {module or 'the input embedding'}")
    if not missing:
        return
    listed = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
    logger.warning(
        "THE ADAPTER %s IS INCOMPLETE: according to its adapter_config.json more was trained than its file contains. "
        "Missing: %s. The merged model takes these from the base and will not answer like the trained model. "
        "The original Qwen fine-tuning script saved adapters of base models this way; the checkpoint-* folders of the "
        "same training are complete: merge one of those, or train again.",
        adapter.folder,
        listed,
    )


def _unties(adapter: Adapter, embedding: str) -> bool:
    """Return whether the embedding and the head of a tied base differ after the adapter is merged.

    Trained rows of the embedding apply to the head too, unless the head was trained itself. Any other change applies to
    the module it was saved for: with ``ensure_weight_tying`` peft saves it for both, without it the head is unchanged.
    """
    first, second = adapter.edits.get(embedding), adapter.edits.get(HEAD_WEIGHT)
    if second is None:
        return first is not None and first.roles.keys() != {"rows"}
    return first is None or not _same_change(adapter, first, second)


def _same_change(adapter: Adapter, embedding: Edit, head: Edit) -> bool:
    """Return whether an edit of an embedding [V, H] and an edit of a linear layer of that shape are the same change."""
    swapped = {"lora_A": "embedding_B", "lora_B": "embedding_A"}
    if {swapped.get(role, role) for role in head.roles} != embedding.roles.keys() or "magnitude" in head.roles:
        return False
    if (head.scale, head.row_indices) != (embedding.scale, embedding.row_indices):
        return False
    for role, name in head.roles.items():
        other = embedding.roles[swapped.get(role, role)]
        if role in swapped:
            if not torch.equal(adapter.tensors.read(name), adapter.tensors.read(other).T):
                return False
        elif not all(map(torch.equal, adapter.tensors.blocks(name), adapter.tensors.blocks(other))):
            return False
    return True
