"""Written tensors against base + adapters, row by row, value by value and along the adapter's change.

A value that is rounded to nearest is as near to the exact one as a number of the written dtype can be. A dithered value
is off by less than the distance of its two neighbours. Where an adapter changes values by less than that, this proves
little, because the base's value is as near. So the errors of dithered values are also multiplied with the change and
summed over each row and over the tensor: dithering is unbiased, so Bernstein's inequality bounds the sums. A layer
without its change, or with another scale, exceeds them.

Rows that no adapter changes are compared bit for bit.

Shapes: a matrix is [O, I]; a vector is compared as [O, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from checkpoints.model_config import Rounding, dtype_name
from export.verify.reference import MatrixChange, changed_matrix

CHECKED_ELEMENTS = 2**17
"""Values that are compared at a time: their float32 copies stay in the cache of a core."""

LOG_ODDS = 30.0
"""A sum of errors of unbiased rounding exceeds its bound with a probability below exp(-30)."""

FLOOR = 1e-5
"""Allowed error for float32 arithmetic per value, as a share of the largest value of its row."""

SUM_FLOOR = 1e-6
"""The same for the sum over a row of errors times changes, as a share of the sum of |largest value x change|."""

SHARE = 0.01
"""Allowed difference of the share of the change that is written from 1."""

UNMERGED = 0.01
"""Rows that lack all of the change but for this share are compared with the base's."""


@dataclass
class Fault:
    """The worst difference of a tensor beyond what rounding can cause.

    Attributes:
        excess: the difference divided by the allowed one.
        rows: number of rows that differ.
    """

    text: str
    excess: float
    rows: int = 1


class TensorCheck:
    """Compares one written tensor with base + adapters, some rows at a time.

    Args:
        name: of the tensor, for messages.
        dtype: in which it is written.
        rounding: with which 16-bit values are written.

    Attributes:
        learnt: squared norm of the change that the adapters make.
        lost: scalar product of the errors with that change; ``1 + lost / learnt`` is the share of it that was written.
    """

    def __init__(self, name: str, dtype: torch.dtype, rounding: Rounding) -> None:
        self.name, self.dtype = name, dtype
        self.learnt = self.lost = 0.0
        self._info, self._dtype_name = torch.finfo(dtype), dtype_name(dtype)
        self._is_nearest = rounding == "nearest" or dtype not in (torch.bfloat16, torch.float16)
        self._sums = _Sums.none()
        self._fault: Fault | None = None
        self._unit = "row"

    def compare(self, base: Tensor, changes: Sequence[MatrixChange], written: Tensor, first: int = 0) -> None:
        """Compare rows.

        Args:
            base: [O, I], the base's rows.
            changes: the adapters' changes to them.
            written: [O, I].
            first: index of the first row.
        """
        step = max(1, CHECKED_ELEMENTS // max(1, base.shape[1]))
        for start in range(0, len(base), step):
            stop = min(start + step, len(base))
            parts = [change.part(start, stop) for change in changes]
            if all(part.is_empty for part in parts):
                self._compare_unchanged(base[start:stop], written[start:stop], first + start)
            else:
                plain = base[start:stop].to(torch.float32)
                self._compare_changed(plain, changed_matrix(parts, plain), written[start:stop], first + start)

    def compare_vector(self, base: Tensor, exact: Tensor, written: Tensor) -> None:
        """Compare a vector with the vector ``exact`` of base + adapters."""
        self._unit = "value"
        plain = base.to(torch.float32)
        if torch.equal(plain, exact):
            self._compare_unchanged(base[:, None], written[:, None], 0)
        else:
            self._compare_changed(plain[:, None], exact[:, None], written[:, None], 0)

    def faults(self) -> list[str]:
        """Describe the worst difference, if there is one."""
        if (excess := float(self._sums.excess().max())) > 1:
            self._add(Fault(f"has {self._sums.shares(0)}", excess))
        if self._fault is None:
            return []
        more = f" (and {self._fault.rows - 1} more)" if self._fault.rows > 1 else ""
        return [f"{self.name}: {self._fault.text}{more}"]

    def _compare_unchanged(self, base: Tensor, written: Tensor, first: int) -> None:
        rounded = base.to(self.dtype)
        if not same_bits(rounded, written):
            self._add_unchanged((rounded != written).any(1), first)

    def _compare_changed(self, plain: Tensor, exact: Tensor, written: Tensor, first: int) -> None:
        """Compare rows of float32 values; ``exact`` are those of base + adapters."""
        change, error = exact - plain, written.to(torch.float32) - exact
        learnt, terms = torch.linalg.vecdot(change, change), error * change
        lost = terms.sum(1)
        self.learnt += float(learnt.sum(dtype=torch.float64))
        self.lost += float(lost.sum(dtype=torch.float64))
        size = exact.abs()
        largest = size.amax(1)
        floor = FLOOR * largest + self._info.smallest_normal * self._info.eps
        if self._is_nearest:
            allowed = (exact.to(self.dtype).to(torch.float32) - exact).abs_()
        else:
            allowed = size.mul_(self._info.eps)  # at least the distance of the neighbours
        excess = error.abs().sub_(allowed).amax(1)
        if (wrong := ~(excess <= floor)).any():
            self._add_wrong(wrong, error, allowed, first)
            return
        if self._is_nearest and self._info.eps > FLOOR:  # nothing can be nearer
            return
        if (still := learnt == 0).any():
            held = plain[still].to(self.dtype)
            moved = (held.to(torch.float32) == plain[still]) & (held != written[still])
            self._add_unchanged(torch.zeros_like(still).index_put((still.nonzero()[:, 0],), moved.any(1)), first)
        if (unmerged := ((lost + learnt).abs() <= UNMERGED * learnt) & ~still).any():
            rows = unmerged.nonzero()[:, 0]
            self._check_unmerged(plain[rows], exact[rows], written[rows], rows + first)
        sums = _Sums(
            lost,
            learnt,
            variance=torch.linalg.vecdot(terms, terms),
            term=self._info.eps * largest * torch.maximum(change.amax(1), -change.amin(1)),
            floor=SUM_FLOOR * largest * (learnt * change.shape[1]).sqrt(),
        )
        excess = sums.excess()
        if (worst := float(excess.max())) > 1:
            row = int(excess.argmax())
            self._add(Fault(f"{self._unit} {first + row} has {sums.shares(row)}", worst, int((excess > 1).sum())))
        self._sums = self._sums.plus(sums)

    def _check_unmerged(self, plain: Tensor, exact: Tensor, written: Tensor, rows: Tensor) -> None:
        """Report rows that are the base's although dithering would almost certainly have moved a value."""
        are_base = (plain.to(self.dtype) == written).all(1)
        # The chance that a value moves is its change divided by the distance of its neighbours.
        chances = ((exact - plain).abs() / (self._info.eps * exact.abs())).nan_to_num(0).clamp(max=1)
        if (wrong := are_base & (chances.sum(1) > LOG_ODDS)).any():
            text = f"{self._unit} {int(rows[wrong][0])} is the base's, without the adapter's change"
            self._add(Fault(text, 1.0, int(wrong.sum())))

    def _add_unchanged(self, moved: Tensor, first: int) -> None:
        if moved.any():
            row = first + int(moved.nonzero()[0])
            text = f"{self._unit} {row} differs from the base's, and no adapter changes it"
            self._add(Fault(text, math.inf, int(moved.sum())))

    def _add_wrong(self, wrong: Tensor, error: Tensor, allowed: Tensor, first: int) -> None:
        row = int(wrong.nonzero()[0])
        value = int((error[row].abs() - allowed[row]).nan_to_num(math.inf).argmax())
        text = (
            f"{self._unit} {first + row} is off by {float(error[row, value].abs()):.2g}, rounding to "
            f"{self._dtype_name} explains {float(allowed[row, value]):.2g}"
        )
        self._add(Fault(text, math.inf, int(wrong.sum())))

    def _add(self, fault: Fault) -> None:
        """Keep the worst fault, and count the rows of all."""
        if self._fault is None:
            self._fault = fault
            return
        worst = fault if fault.excess > self._fault.excess else self._fault
        self._fault = Fault(worst.text, worst.excess, self._fault.rows + fault.rows)


@dataclass(frozen=True)
class _Sums:
    """Sums of errors times changes over rows, and what bounds them.

    Attributes:
        lost, learnt: sums of error x change and of change squared.
        variance: of ``lost``, for rounding that keeps the change on average: the sum of its squared terms.
        term: bound of a single term of ``lost``.
        floor: allowed for float32.
    """

    lost: Tensor
    learnt: Tensor
    variance: Tensor
    term: Tensor
    floor: Tensor

    @classmethod
    def none(cls) -> _Sums:
        return cls(*torch.zeros(5, 1, dtype=torch.float64))

    def bound(self) -> Tensor:
        """Bernstein's: larger sums have a probability below exp(-LOG_ODDS)."""
        chance = (2 * LOG_ODDS * self.variance).sqrt() + LOG_ODDS / 3 * self.term
        return chance + SHARE * self.learnt + self.floor

    def excess(self) -> Tensor:
        """Sums divided by their bounds."""
        return torch.where(self.lost == 0, 0, self.lost.abs() / self.bound()).nan_to_num(math.inf)

    def shares(self, row: int) -> str:
        """Describe the share of the change that was written, and the shares that rounding can leave."""
        lost, learnt, bound = float(self.lost[row]), float(self.learnt[row]), float(self.bound()[row])
        share, width = 1 + lost / learnt, bound / learnt
        return f"{share:.0%} of the adapter's change, rounding leaves {max(0.0, 1 - width):.0%} to {1 + width:.0%}"

    def plus(self, rows: _Sums) -> _Sums:
        """Return the sums over these and more rows."""
        total = {each.name: getattr(self, each.name) + getattr(rows, each.name).sum().double() for each in fields(self)}
        return _Sums(**total | {"term": torch.maximum(self.term, rows.term.max().double())})


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors of one dtype are equal bit for bit."""
    first, second = first.contiguous().flatten(), second.contiguous().flatten()
    widest = torch.int64 if first.nbytes % 8 == 0 else torch.int8
    return torch.equal(first.view(widest), second.view(widest))
