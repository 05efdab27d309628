"""A base with unmerged adapters: what ``checkpoints.fold`` has to reproduce, computed independently of it.

A linear layer computes ``W x + b`` plus each adapter's contribution, as peft does in training; no merged matrix is
formed. Nothing of ``checkpoints.fold`` is used but the type of its input.

Shapes: a linear weight is [O, I], an embedding [V, C]; R is a rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoints.adapter import Edit
from checkpoints.fold import WeightedAdapter
from checkpoints.source import TensorSource, row_blocks
from qwen_model.architectures import HEAD_WEIGHT


@dataclass(frozen=True)
class MatrixChange:
    """One adapter's change to some rows of a matrix W; parts that the adapter does not have are ``None``.

    Attributes:
        weight: the adapter's weight in the merge.
        replacement: [O, I], replaces W.
        down, up: [R, I] and [O, R], whose product is added; ``up`` includes the adapter's scale.
        factor: DoRA's, [O, 1] on the outputs, or [1, I] on the columns of an embedding.
        rows: [N, I], replaces the rows ``indices`` [N].
    """

    weight: float
    replacement: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None
    factor: Tensor | None = None
    rows: Tensor | None = None
    indices: Tensor | None = None

    @property
    def is_empty(self) -> bool:
        """Whether the rows stay as they are."""
        has_rows = self.indices is not None and len(self.indices) > 0
        return self.replacement is None and self.up is None and self.factor is None and not has_rows

    def apply(self, x: Tensor, unchanged: Tensor) -> Tensor:
        """Return the changed matrix times ``x``, [..., O].

        Args:
            x: [..., I].
            unchanged: W times ``x``.
        """
        y = unchanged if self.replacement is None else x @ self.replacement.T
        if self.down is not None and self.up is not None:
            y = y + x @ self.down.T @ self.up.T
        if self.factor is not None:
            y = y * self.factor.T
        if self.rows is not None and self.indices is not None:
            y = y.index_copy(-1, self.indices, x @ self.rows.T)
        return y

    def matrix(self, unchanged: Tensor) -> Tensor:
        """Return the changed matrix [O, I] for W in float32."""
        y = unchanged if self.replacement is None else self.replacement
        if self.down is not None and self.up is not None:
            y = torch.addmm(y, self.up, self.down)
        if self.factor is not None:
            y = y * self.factor
        if self.rows is not None and self.indices is not None:
            y = y.index_copy(0, self.indices, self.rows)
        return y

    @property
    def is_product(self) -> bool:
        """Whether ``up @ down`` is all that changes."""
        return self.up is not None and self.replacement is None and self.factor is None and self.rows is None

    def factors(self, rows: slice) -> tuple[Tensor, Tensor] | None:
        """Return the matrices [N, R] and [R, I] whose product is added to some rows; ``None`` without a low rank."""
        if self.up is None or self.down is None:
            return None
        up, down, factor = self.up[rows] * self.weight, self.down, self.factor
        if factor is None:
            return up, down
        return (up * factor[rows], down) if factor.shape[1] == 1 else (up, down * factor)


def changed_matrix(changes: Sequence[MatrixChange], unchanged: Tensor) -> Tensor:
    """Return W, in float32, plus the weighted difference that each change makes to it."""
    if [change.weight for change in changes] == [1.0]:
        return changes[0].matrix(unchanged)
    result = torch.zeros_like(unchanged)
    for change in changes:
        result.add_(change.matrix(unchanged) - unchanged, alpha=change.weight)
    return result.add_(unchanged)  # at the end: opposite changes cancel


class AdaptedLinear(nn.Module):
    """A linear layer, or some of its outputs, with unmerged adapters.

    The weight is multiplied in its own dtype; inputs, outputs and adapters have the dtype of the states.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, changes: Sequence[MatrixChange]) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.changes = list(changes)

    def forward(self, x: Tensor) -> Tensor:
        unchanged = F.linear(x.to(self.weight.dtype), self.weight).to(x.dtype)
        y = unchanged
        if self.changes:
            rest = 1 - sum(change.weight for change in self.changes)
            y = unchanged * rest if rest else torch.zeros_like(unchanged)
            for change in self.changes:
                y.add_(change.apply(x, unchanged), alpha=change.weight)
        return y if self.bias is None else y + self.bias


class AdaptedParameters:
    """Parameters of a model with unmerged adapters, in float32.

    Args:
        source: the base's tensors.
        adapters: in the base's layout; none for a model without adapters.
        tied_to: name of the embedding's weight if the head is tied to it.
        keeps_bfloat16: compute linear layers that are stored in bfloat16 in that dtype.
    """

    def __init__(
        self,
        source: TensorSource,
        adapters: Sequence[WeightedAdapter],
        tied_to: str | None,
        keeps_bfloat16: bool = False,
    ) -> None:
        self.source, self.adapters, self._tied_to = source, adapters, tied_to
        self._keeps_bfloat16 = keeps_bfloat16
        self._norms: dict[tuple[str, int], Tensor] = {}

    def stored_name(self, name: str) -> str:
        """Return the name of the tensor that a parameter is read from: the embedding for a tied head."""
        return self._tied_to if self._tied_to is not None and name == HEAD_WEIGHT else name

    def stored_rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read rows of a parameter without its adapters. Do not change them in place: they may be a view of a file."""
        return self.source.rows(self.stored_name(name), start, stop).to(torch.float32)

    def weight(self, name: str) -> Tensor:
        """Return a linear layer's weight without its adapters, in float32 unless bfloat16 is kept."""
        stored = self.source.read(name)
        keeps = self._keeps_bfloat16 and stored.dtype == torch.bfloat16
        return stored if keeps else stored.to(torch.float32)

    def vector(self, name: str) -> Tensor:
        """Return a bias, or the weight of a norm or a convolution, with the adapters applied."""
        stored = self.stored_rows(name)
        value = stored.clone()
        for adapter, edit in self._edits(name):
            changed = self._read(adapter, edit, "replacement") if "replacement" in edit.roles else stored
            if "lora_bias" in edit.roles:
                changed = changed + edit.scale * self._read(adapter, edit, "lora_bias")
            value += adapter.weight * (changed - stored)
        return value

    def linear_rows(self, weight: str, start: int, stop: int) -> AdaptedLinear:
        """Return the outputs ``start`` to ``stop`` of a linear layer without bias, in float32."""
        return AdaptedLinear(self.stored_rows(weight, start, stop), None, self.changes(weight, start, stop))

    def embedding_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows of an embedding with the adapters applied."""
        stored = self.stored_rows(name, start, stop)
        changes = self.changes(name, start, stop)
        return changed_matrix(changes, stored) if changes else stored

    def changes(self, name: str, start: int = 0, stop: int | None = None) -> list[MatrixChange]:
        """Return each adapter's change to rows of a matrix; none if no adapter changes one of them."""
        start, stop, _ = slice(start, stop).indices(self.source.shape(self.stored_name(name))[0])
        changes = [self._change(name, adapter, edit, start, stop) for adapter, edit in self._edits(name)]
        return [] if all(change.is_empty for change in changes) else changes

    def _edits(self, name: str) -> Iterator[tuple[WeightedAdapter, Edit]]:
        for adapter in self.adapters:
            edit = adapter.adapter.edits.get(name)
            if edit is None and (tied := self.stored_name(name)) != name:
                # Trained tokens of a tied embedding apply to the head too; other changes to the trained module only.
                shared = adapter.adapter.edits.get(tied)
                edit = shared if shared is not None and shared.roles.keys() == {"rows"} else None
            if edit is not None:
                yield adapter, edit

    @staticmethod
    def _read(adapter: WeightedAdapter, edit: Edit, role: str, start: int = 0, stop: int | None = None) -> Tensor:
        return adapter.adapter.tensors.rows(edit.roles[role], start, stop).to(torch.float32)

    def _change(self, name: str, adapter: WeightedAdapter, edit: Edit, start: int, stop: int) -> MatrixChange:
        roles = edit.roles
        replacement = down = up = factor = rows = indices = None
        if "replacement" in roles:
            replacement = self._read(adapter, edit, "replacement", start, stop)
        if "lora_A" in roles:
            down = self._read(adapter, edit, "lora_A")
            up = self._read(adapter, edit, "lora_B", start, stop) * edit.scale
            if "magnitude" in roles:
                matrix = self.stored_rows(name, start, stop) if replacement is None else replacement
                norms = torch.linalg.vector_norm(torch.addmm(matrix, up, down), dim=1)
                factor = (self._read(adapter, edit, "magnitude", start, stop) / norms)[:, None]
        if "embedding_A" in roles:
            # In an embedding A [R, V] has a column per token, and B [C, R] gives the states.
            up = adapter.adapter.tensors.read(roles["embedding_A"])[:, start:stop].T.to(torch.float32) * edit.scale
            down = self._read(adapter, edit, "embedding_B").T
            if "magnitude" in roles:
                factor = (self._read(adapter, edit, "magnitude") / self._column_norms(name, adapter, edit))[None]
        if "rows" in roles:
            selected = [index for index, row in enumerate(edit.row_indices) if start <= row < stop]
            indices = torch.tensor([edit.row_indices[index] - start for index in selected], dtype=torch.long)
            rows = self._read(adapter, edit, "rows")[selected]
        return MatrixChange(adapter.weight, replacement, down, up, factor, rows, indices)

    def _column_norms(self, name: str, adapter: WeightedAdapter, edit: Edit) -> Tensor:
        """Return [C], the norms over all tokens of an embedding's columns, by which DoRA divides."""
        key = (name, id(adapter))
        if key not in self._norms:
            no_magnitude = {role: tensor for role, tensor in edit.roles.items() if role != "magnitude"}
            lora_only = Edit(no_magnitude, edit.rank, edit.scale)
            rows, width = self.source.shape(name)
            squares = torch.zeros(width, dtype=torch.float64)
            for start, stop in row_blocks(rows, width):
                change = self._change(name, adapter, lora_only, start, stop)
                squares += change.matrix(self.stored_rows(name, start, stop)).double().square().sum(0)
            self._norms[key] = squares.sqrt().float()
        return self._norms[key]
