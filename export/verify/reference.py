"""A base with adapters on it that are not merged: what ``checkpoints.fold`` has to reproduce, computed another way.

A linear layer gives ``W x + b`` and beside it what each adapter adds, as peft computes it in training; no merged matrix
is ever formed for that. Nothing of ``checkpoints.fold`` is used but the type of its input.

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
from qwen_model.block_runner import HEAD

HEAD_WEIGHT = f"{HEAD}.weight"


@dataclass(frozen=True)
class Change:
    """What one adapter makes of some rows of a matrix W; parts that it does not have are ``None``.

    Attributes:
        share: the adapter's weight.
        replacement: [O, I], takes the place of W.
        down, up: [R, I] and [O, R], whose product is added; ``up`` holds the adapter's scale.
        factor: DoRA's, on the outputs [O], or [I, 1] on the inputs of an embedding's rows.
        rows: [N, I], take the place of the rows ``indices`` [N].
    """

    share: float
    replacement: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None
    factor: Tensor | None = None
    rows: Tensor | None = None
    indices: Tensor | None = None

    def output(self, x: Tensor | None, plain: Tensor) -> Tensor:
        """The changed matrix times ``x``, [..., O]; ``plain`` is W times ``x``. Without ``x`` it is the identity."""
        y = plain if self.replacement is None else _through(self.replacement, x)
        if self.down is not None and self.up is not None:
            y = y + _through(self.down, x) @ self.up.T
        if self.factor is not None:
            y = y * self.factor
        if self.rows is not None and self.indices is not None:
            y = y.index_copy(-1, self.indices, _through(self.rows, x))
        return y


def _through(matrix: Tensor, x: Tensor | None) -> Tensor:
    return matrix.T if x is None else x @ matrix.T


def _blend(changes: Sequence[Change], x: Tensor | None, plain: Tensor) -> Tensor:
    """W times ``x`` plus, of each adapter, its share of what it changes."""
    rest = 1 - sum(change.share for change in changes)
    blended = plain * rest if rest else torch.zeros_like(plain)
    for change in changes:
        blended.add_(change.output(x, plain), alpha=change.share)
    return blended


class AdaptedLinear(nn.Module):
    """A linear layer, or some outputs of one, with adapters beside it."""

    def __init__(self, weight: Tensor, bias: Tensor | None, changes: Sequence[Change]) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.changes = list(changes)

    def forward(self, x: Tensor) -> Tensor:
        if not self.changes:
            return F.linear(x, self.weight, self.bias)
        y = _blend(self.changes, x, F.linear(x, self.weight))
        return y if self.bias is None else y + self.bias

    def settle(self) -> None:
        """Put the changes into the weight."""
        if self.changes:
            self.weight.data = _blend(self.changes, None, self.weight.data.T).T
            self.changes.clear()


class Adapted:
    """The parameters of a model with adapters on them, in float32; without adapters those that it has.

    Args:
        source: the base's tensors.
        adapters: in the base's layout.
        tied_to: the name of the embedding's weight if it is the head's, too.
    """

    def __init__(
        self, source: TensorSource, adapters: Sequence[WeightedAdapter] = (), tied_to: str | None = None
    ) -> None:
        self.source, self._adapters, self._tied_to = source, adapters, tied_to
        self._norms: dict[tuple[str, int], Tensor] = {}

    def stored_name(self, name: str) -> str:
        """The tensor that a parameter is read from: that of a tied head is the embedding."""
        return self._tied_to if self._tied_to is not None and name == HEAD_WEIGHT else name

    def plain(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of a parameter without its adapters; maybe a view of the file, so not to be changed in place."""
        return self.source.rows(self.stored_name(name), start, stop).to(torch.float32)

    def vector(self, name: str) -> Tensor:
        """A bias or the weight of a norm, with what the adapters add to it."""
        plain = self.plain(name)
        value = plain.clone()
        for adapter, edit in self._edits(name):
            own = self._read(adapter, edit, "replacement") if "replacement" in edit.roles else plain
            if "lora_bias" in edit.roles:
                own = own + edit.scale * self._read(adapter, edit, "lora_bias")
            value += adapter.weight * (own - plain)
        return value

    def linear(self, weight: str, start: int, stop: int) -> AdaptedLinear:
        """Some outputs of a layer without bias."""
        return AdaptedLinear(self.plain(weight, start, stop), None, self.changes(weight, start, stop))

    def embedding_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of an embedding, as a token's lookup gives them."""
        plain = self.plain(name, start, stop)
        changes = self.changes(name, start, stop)
        return _blend(changes, None, plain.T).T if changes else plain

    def changes(self, name: str, start: int = 0, stop: int | None = None) -> list[Change]:
        """What each adapter makes of rows of a matrix."""
        start, stop, _ = slice(start, stop).indices(self.source.shape(self.stored_name(name))[0])
        return [self._change(name, adapter, edit, start, stop) for adapter, edit in self._edits(name)]

    def _edits(self, name: str) -> Iterator[tuple[WeightedAdapter, Edit]]:
        for adapter in self._adapters:
            edit = adapter.adapter.edits.get(name)
            if edit is None and (tied := self.stored_name(name)) != name:
                # Trained tokens of a tied embedding serve the head, too; other changes act where they were trained.
                shared = adapter.adapter.edits.get(tied)
                edit = shared if shared is not None and shared.roles.keys() == {"rows"} else None
            if edit is not None:
                yield adapter, edit

    @staticmethod
    def _read(adapter: WeightedAdapter, edit: Edit, role: str, start: int = 0, stop: int | None = None) -> Tensor:
        return adapter.adapter.tensors.rows(edit.roles[role], start, stop).to(torch.float32)

    def _change(self, name: str, adapter: WeightedAdapter, edit: Edit, start: int, stop: int) -> Change:
        roles = edit.roles
        replacement = down = up = factor = rows = indices = None
        if "replacement" in roles:
            replacement = self._read(adapter, edit, "replacement", start, stop)
        if "lora_A" in roles:
            down, up = (
                self._read(adapter, edit, "lora_A"),
                self._read(adapter, edit, "lora_B", start, stop) * edit.scale,
            )
            if "magnitude" in roles:
                own = self.plain(name, start, stop) if replacement is None else replacement
                norms = torch.linalg.vector_norm(torch.addmm(own, up, down), dim=1)
                factor = self._read(adapter, edit, "magnitude", start, stop) / norms
        if "embedding_A" in roles:
            # For an embedding A reads the token and B gives the states.
            up = adapter.adapter.tensors.read(roles["embedding_A"])[:, start:stop].T.to(torch.float32) * edit.scale
            down = self._read(adapter, edit, "embedding_B").T
            if "magnitude" in roles:
                factor = (self._read(adapter, edit, "magnitude") / self._column_norms(name, adapter, edit))[:, None]
        if "rows" in roles:
            inside = [place for place, row in enumerate(edit.row_indices) if start <= row < stop]
            indices = torch.tensor([edit.row_indices[place] - start for place in inside], dtype=torch.long)
            rows = self._read(adapter, edit, "rows")[inside]
        return Change(adapter.weight, replacement, down, up, factor, rows, indices)

    def _column_norms(self, name: str, adapter: WeightedAdapter, edit: Edit) -> Tensor:
        """[C]: the norms of an embedding's columns that DoRA divides by, over all tokens."""
        key = (name, id(adapter))
        if key not in self._norms:
            bare = Edit({role: own for role, own in edit.roles.items() if role != "magnitude"}, edit.rank, edit.scale)
            rows, width = self.source.shape(name)
            squares = torch.zeros(width, dtype=torch.float64)
            for start, stop in row_blocks(rows, width):
                change = self._change(name, adapter, bare, start, stop)
                squares += change.output(None, self.plain(name, start, stop).T).double().square().sum(1)
            self._norms[key] = squares.sqrt().float()
        return self._norms[key]
