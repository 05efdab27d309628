"""The share of a learnt change that written weights contain: measured while they are rounded, and told to the user."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from checkpoints.kept import Kept
from checkpoints.model_config import Rounding
from checkpoints.rounding import round_rows
from checkpoints.source import TensorSource, View

ENOUGH = 0.95
"""The share of the change below which a merge warns."""

_MEASURED = 2**17
"""About as many weights of a tensor are measured, in rows at equal distances: the share is known to 1 or 2 %."""


@dataclass
class KeptChange:
    """What was kept of the changes to all tensors that were rounded.

    Attributes:
        by_tensor: tensors whose change is not zero, by the names they are written under.
    """

    by_tensor: dict[str, Kept] = field(default_factory=dict)

    def total(self) -> Kept:
        return Kept.sum(self.by_tensor.values())

    def by_kind(self) -> dict[str, Kept]:
        """Return the sums over layers of the same kind, such as ``mlp.down_proj``, in the order of the model."""
        kinds: dict[str, list[Kept]] = {}
        for name, kept in self.by_tensor.items():
            kinds.setdefault(_kind_of(name), []).append(kept)
        return {kind: Kept.sum(parts) for kind, parts in kinds.items()}

    def worst(self) -> tuple[str, Kept]:
        """Return name and sums of the tensor with the smallest share."""
        return min(self.by_tensor.items(), key=lambda item: item[1].share)

    def describe(self) -> str:
        """Describe the result in one line; empty if no change was rounded."""
        if not self.by_tensor:
            return ""
        total, (name, worst) = self.total(), self.worst()
        return (
            f"kept {_percent(total.share)} of the change that was learnt (worst: {_short(name)} "
            f"{_percent(worst.share)}); {_percent(total.moved_share)} of these weights moved"
        )

    def describe_kinds(self) -> str:
        """Describe the share of each kind of layer in one line."""
        return ", ".join(f"{kind} {_percent(kept.share)}" for kind, kept in self.by_kind().items())

    def report(self) -> Mapping[str, Any]:
        """Return the figures for ``merge_report.json``; ``kept`` is ``None`` if no change was rounded."""
        total = self.total()
        figures: dict[str, Any] = {"kept": round(total.share, 5), "moved": round(total.moved_share, 5)}
        if self.by_tensor:
            name, worst = self.worst()
            figures["worst"] = {"name": name, "kept": round(worst.share, 5)}
        figures["by_kind"] = {
            kind: {"kept": round(kept.share, 5), "moved": round(kept.moved_share, 5)}
            for kind, kept in self.by_kind().items()
        }
        return figures


class RoundedTensors(View):
    """Computed tensors, rounded to the dtype they are written in; measures what is kept of their change.

    Args:
        below: the merged tensors; tensors that are returned in the dtype they are written in are passed on.
        base: the tensors before the change, under the same names.
        rounding: for rows that have changed; others are rounded to nearest.
    """

    def __init__(self, below: TensorSource, base: TensorSource, rounding: Rounding) -> None:
        super().__init__(below)
        self.base, self.rounding, self.kept = base, rounding, KeptChange()

    def unrounded(self) -> TensorSource:
        return self.below

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        exact, dtype = self.below.rows(name, start, stop), self.dtype(name)
        if exact.dtype == dtype or exact.dim() == 0:
            return exact
        base = self.base.rows(name, start, stop)
        unchanged = None
        if base.dtype != dtype:  # otherwise the base's values stay, whichever way they are rounded
            unchanged = (exact == base).view(len(exact), -1).all(1)
            if unchanged.all():
                return exact
        exact = exact.to(torch.float32)
        rounded = round_rows(exact.view(len(exact), -1), dtype, self.rounding, name, start).view(exact.shape)
        if unchanged is not None:
            rounded[unchanged] = exact[unchanged].to(dtype)
        self._measure(name, start, exact, rounded, base)
        return rounded

    def _measure(self, name: str, first: int, exact: Tensor, rounded: Tensor, base: Tensor) -> None:
        """Add a block whose first row has the index ``first`` to the sums of its tensor; of large tensors some rows."""
        step = max(1, math.prod(self.shape(name)) // _MEASURED)
        parts = slice(-first % step, None, step)
        if (kept := Kept.of(base[parts], exact[parts], rounded[parts]).times(step)).learnt:
            self.kept.by_tensor[name] = Kept.sum([self.kept.by_tensor.get(name, Kept()), kept])


def _kind_of(name: str) -> str:
    """Return a layer's name without its place: ``model.layers.3.mlp.down_proj.weight`` -> ``mlp.down_proj``."""
    return re.sub(r"^.*\.\d+\.|^(model|transformer)\.|\.weight$", "", name)


def _short(name: str) -> str:
    """Return a layer's name without what all names share: ``layers.3.mlp.down_proj``."""
    return re.sub(r"^(model|transformer)\.|\.weight$", "", name)


def _percent(share: float) -> str:
    return f"{share:.1%}".replace("%", " %")
