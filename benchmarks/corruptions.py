"""Corruptions of one tensor of a merged checkpoint in Qwen2's layout, for ``benchmarks.proof``."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from checkpoints.adapter import read_adapter
from checkpoints.files import load_json
from checkpoints.fold import WeightedAdapter
from checkpoints.model_config import Rounding
from checkpoints.rounding import round_rows
from checkpoints.shards import open_checkpoint
from checkpoints.source import TensorSource, View
from export.verify.compare import check_tensor
from export.verify.layered_model import LayeredModel
from export.verify.reference import AdaptedParameters

Corruption = tuple[str, Tensor]


class Corruptor:
    """A correct merge and the means to make wrong tensors of it.

    Args:
        base, adapter, merged: folders; the layout is Qwen2's.
        rounding: with which ``merged`` was written.
    """

    def __init__(self, base: Path, adapter: Path, merged: Path, rounding: Rounding) -> None:
        source, self.written = open_checkpoint(base), open_checkpoint(merged)
        model = LayeredModel(load_json(base / "config.json"), source)
        self._tied_to, self._rounding = model.tied_to, rounding
        self.adapted = AdaptedParameters(source, [WeightedAdapter(read_adapter(adapter))], model.tied_to)
        self.matrices = [name for name in model.shapes if self.adapted.changes(name) and "layers" in name]
        self.embedding = model.embedding
        self.norms = [name for name in model.shapes if name.endswith("norm.weight")]
        self.biases = [name for name in model.shapes if name.endswith(".bias")]

    def draw(self, kind: str, draw: random.Random) -> Corruption | None:
        """Return the name and the values of a wrong tensor; ``None`` if the model has none of this kind."""
        for _ in range(20):  # some are equal to the right tensor: an unmerged row, if rounding moves none of its values
            corruption = KINDS[kind](self, draw)
            if corruption is not None and not torch.equal(corruption[1], self.written.read(corruption[0])):
                return corruption
        return None

    def faults(self, name: str, tensor: Tensor) -> list[str]:
        """Return what the verification reports; it compares every tensor by itself."""
        source = _Replaced(self.written, name, tensor)
        return check_tensor(name, self.adapted, AdaptedParameters(source, (), self._tied_to), self._rounding).faults()

    def values(self, name: str) -> Tensor:
        """Return a copy of a written tensor."""
        return self.written.read(name).clone()

    def base(self, name: str) -> Tensor:
        return self.adapted.stored_rows(name)

    def merged_with(self, name: str, change: Tensor) -> Tensor:
        """Return a matrix merged with this change, in float32, and rounded as the merge was."""
        return round_rows(self.base(name) + change, self.written.dtype(name), self._rounding, name, 0)

    def change(self, name: str) -> Tensor:
        """Return the adapter's change to a matrix."""
        (change,) = self.adapted.changes(name)
        return change.matrix(torch.zeros(self.adapted.source.shape(name)))

    def sibling(self, name: str, draw: random.Random) -> str:
        """Return the same tensor of another layer."""
        parts = name.split(".")
        return draw.choice([each for each in self.matrices if each.split(".")[3:] == parts[3:] and each != name])


class _Replaced(View):
    def __init__(self, below: TensorSource, name: str, tensor: Tensor) -> None:
        super().__init__(below)
        self._name, self._tensor = name, tensor

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self._tensor[start:stop] if name == self._name else self.below.rows(name, start, stop)


def _on_rows(edit: Callable[[Tensor, int, int], None], columns: bool = False) -> Callable[..., Corruption]:
    """A corruption that edits a matrix in place, given two of its rows (or columns, as rows of the transposed one)."""

    def corrupt(of: Corruptor, draw: random.Random) -> Corruption:
        name = draw.choice(of.matrices)
        values = of.values(name)
        lines = values.T if columns else values
        edit(lines, *draw.sample(range(len(lines)), 2))
        return name, values

    return corrupt


def _scaled(rows: Tensor, first: int, second: int) -> None:
    rows[first] *= 1.1


def _swapped(rows: Tensor, first: int, second: int) -> None:
    rows[[first, second]] = rows[[second, first]]


def _repeated(rows: Tensor, first: int, second: int) -> None:
    rows[first] = rows[second]


def _zeroed(rows: Tensor, first: int, second: int) -> None:
    rows[first] = 0


def _doubled_value(rows: Tensor, first: int, second: int) -> None:
    rows[first, second % rows.shape[1]] *= 2


def _with_change(edit: Callable[[Corruptor, str, Tensor, random.Random], Tensor]) -> Callable[..., Corruption]:
    """A corruption that merges another change than the adapter's into a matrix."""

    def corrupt(of: Corruptor, draw: random.Random) -> Corruption:
        name = draw.choice(of.matrices)
        return name, of.merged_with(name, edit(of, name, of.change(name), draw))

    return corrupt


def _row_unmerged(of: Corruptor, draw: random.Random) -> Corruption:
    name = draw.choice(of.matrices)
    values = of.values(name)
    row = draw.randrange(len(values))
    values[row] = of.base(name)[row].to(values.dtype)
    return name, values


def _other_b(of: Corruptor, name: str, change: Tensor, draw: random.Random) -> Tensor:
    (own,), (other,) = of.adapted.changes(name), of.adapted.changes(of.sibling(name, draw))
    assert own.down is not None and other.up is not None
    return other.up @ own.down


def _one_rank_less(of: Corruptor, name: str, change: Tensor, draw: random.Random) -> Tensor:
    (own,) = of.adapted.changes(name)
    assert own.down is not None and own.up is not None
    rank = draw.randrange(len(own.down))
    return change - torch.outer(own.up[:, rank], own.down[rank])


def _of_another_layer(of: Corruptor, draw: random.Random) -> Corruption:
    name = draw.choice(of.matrices)
    return name, of.values(of.sibling(name, draw))


def _transposed(of: Corruptor, draw: random.Random) -> Corruption | None:
    square = [name for name in of.matrices if len(set(of.written.shape(name))) == 1]
    return (name := draw.choice(square), of.values(name).T.contiguous()) if square else None


def _embedding_row(of: Corruptor, draw: random.Random) -> Corruption:
    values = of.values(of.embedding)
    values[draw.randrange(len(values))] *= 1.1
    return of.embedding, values


def _vector_value(names: Callable[[Corruptor], list[str]]) -> Callable[..., Corruption | None]:
    """A corruption of one value of a vector."""

    def corrupt(of: Corruptor, draw: random.Random) -> Corruption | None:
        if not names(of):
            return None
        name = draw.choice(names(of))
        values = of.values(name)
        values[draw.randrange(len(values))] *= 1.1
        return name, values

    return corrupt


KINDS: dict[str, Callable[[Corruptor, random.Random], Corruption | None]] = {
    "a row scaled by 1.1": _on_rows(_scaled),
    "two rows swapped": _on_rows(_swapped),
    "two columns swapped": _on_rows(_swapped, columns=True),
    "a row written twice": _on_rows(_repeated),
    "a row of zeros": _on_rows(_zeroed),
    "one value doubled": _on_rows(_doubled_value),
    "a row unmerged": _row_unmerged,
    "a layer unmerged": lambda of, draw: (name := draw.choice(of.matrices), of.base(name).to(of.written.dtype(name))),
    "alpha halved in a layer": _with_change(lambda of, name, change, draw: change / 2),
    "alpha doubled in a layer": _with_change(lambda of, name, change, draw: change * 2),
    "B of another layer": _with_change(_other_b),
    "one rank missing": _with_change(_one_rank_less),
    "the tensor of another layer": _of_another_layer,
    "a square matrix transposed": _transposed,
    "an embedding row scaled by 1.1": _embedding_row,
    "a norm's value scaled by 1.1": _vector_value(lambda of: of.norms),
    "a bias's value scaled by 1.1": _vector_value(lambda of: of.biases),
}
