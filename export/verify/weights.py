"""Written tensors against base + adapters: each value, each row, and sums along the change and each of its ranks.

A value that is rounded to nearest is as near to the exact one as a number of the written dtype can be. A dithered value
is one of the two neighbours of the exact one. Where an adapter changes values by less than their distance, this proves
little, because the base's value is a neighbour too. So the errors of dithered values are also multiplied with the
change, and with what each rank of an adapter adds to it, and summed: dithering is unbiased, so Bernstein's inequality
bounds the sums. A layer without its change, with another scale, or without one of its ranks exceeds them.

Rows that no adapter changes are compared bit for bit.

Shapes: a matrix is [O, I]; a vector is compared as [O, 1]; N rows of a block are summed; R is a rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from checkpoints.model_config import Rounding, dtype_name
from export.verify.reference import MatrixChange, changed_matrix

SUMMED = 2**19
"""About as many values of a tensor are summed, in rows at equal distances. All are compared with their neighbours."""

LOG_ODDS = 30.0
"""A sum of errors of unbiased rounding exceeds its bound with a probability below exp(-30)."""

FLOOR = 1e-5
"""Allowed error for float32 arithmetic per value, as a share of the largest value of its row."""

SUM_FLOOR = 1e-6
"""The same for sums of errors times changes, as a share of the sum of |largest value x change|."""

SHARE = 0.01
"""Allowed difference of the share of the change that is written from 1."""

PROBED = 64
"""Columns that tell which rows may be the base's."""

_EXPONENT = 0x7F800000
"""The bits of a float32 that are its power of two."""


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
        step: distance of the rows that are summed.
    """

    def __init__(self, name: str, dtype: torch.dtype, rounding: Rounding, step: int = 1) -> None:
        self.name, self.dtype, self._step = name, dtype, step
        self._info, self._dtype_name = torch.finfo(dtype), dtype_name(dtype)
        self._is_nearest = rounding == "nearest" or dtype not in (torch.bfloat16, torch.float16)
        self._sums: _Sums | None = None
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
        if all(change.is_empty for change in changes):
            self._compare_unchanged(base, written, first)
        else:
            exact = changed_matrix(changes, base.to(torch.float32))
            self._compare_changed(base, exact, written, first, changes)

    def compare_vector(self, base: Tensor, exact: Tensor, written: Tensor) -> None:
        """Compare a vector with the vector ``exact`` of base + adapters."""
        self._unit = "value"
        if torch.equal(base.to(torch.float32), exact):
            self._compare_unchanged(base[:, None], written[:, None], 0)
        else:
            self._compare_changed(base[:, None], exact[:, None], written[:, None], 0, ())

    def change(self) -> tuple[float, float]:
        """Return the squared norm of the change, and its scalar product with the errors.

        One plus the second divided by the first is the share of the change that was written.
        """
        if self._sums is None:
            return 0.0, 0.0
        return float(self._sums.learnt[0]) * self._step, float(self._sums.lost[0]) * self._step

    def faults(self) -> list[str]:
        """Describe the worst difference, if there is one."""
        if self._sums is not None and not self._values_decide:
            excess = self._sums.excess()
            if excess[worst := int(excess.argmax())] > 1:
                self._add(Fault(f"has {self._sums.shares(worst)}", float(excess[worst])))
        if self._fault is None:
            return []
        more = f" (and {self._fault.rows - 1} more)" if self._fault.rows > 1 else ""
        return [f"{self.name}: {self._fault.text}{more}"]

    def _compare_unchanged(self, base: Tensor, written: Tensor, first: int) -> None:
        rounded = base.to(self.dtype)
        if not same_bits(rounded, written):
            self._add_unchanged((rounded != written).any(1), torch.arange(first, first + len(base)))

    @property
    def _values_decide(self) -> bool:
        """Whether values are their exact ones rounded to nearest in 16 bits: nothing can be nearer."""
        return self._is_nearest and self._info.eps > FLOOR

    def _compare_changed(
        self, base: Tensor, exact: Tensor, written: Tensor, first: int, changes: Sequence[MatrixChange]
    ) -> None:
        """Compare rows; ``exact`` are those of base + adapters in float32."""
        if not self._are_neighbours(exact, written) and self._add_wrong(exact, written, first):
            return
        if not self._values_decide:
            self._compare_still(base, exact, written, first, changes)
            self._compare_with_base(base, exact, written, first)
        picked = slice(-first % self._step, None, self._step)
        if len(exact := exact[picked]):
            factors = [] if self._values_decide else [change.factors(picked) for change in changes]
            plain = base[picked].to(torch.float32)
            sums = _Sums.of(plain, exact, written[picked], [each for each in factors if each], self._info.eps)
            self._sums = sums if self._sums is None else self._sums.plus(sums)

    def _are_neighbours(self, exact: Tensor, written: Tensor) -> bool:
        """Return whether all values are what they can be, by bits; if not, arithmetic decides."""
        if self._is_nearest:
            return same_bits(exact.to(self.dtype), written)
        if self.dtype != torch.bfloat16:
            return False
        # The first 16 bits of a float32 are the neighbour that is nearer to zero.
        above = exact.view(torch.int32).bitwise_right_shift(16).to(torch.int16).sub_(written.view(torch.int16))
        low, high = torch.aminmax(above)
        return int(low) >= -1 and int(high) <= 0

    def _add_wrong(self, exact: Tensor, written: Tensor, first: int) -> bool:
        """Report values that are off by more than rounding explains; return whether there are any."""
        error, smallest = (written.to(torch.float32) - exact).abs_(), self._info.smallest_normal * self._info.eps
        floor = FLOOR * exact.abs().amax(1) + smallest
        if self._is_nearest:
            allowed = (exact.to(self.dtype).to(torch.float32) - exact).abs_()
        else:
            power_of_two = (exact.view(torch.int32) & _EXPONENT).view(torch.float32)
            allowed = power_of_two.mul_(self._info.eps).clamp_(min=smallest)  # the distance of the neighbours
        excess = error - allowed
        if not (wrong := ~(excess.amax(1) <= floor)).any():
            return False
        row = int(wrong.nonzero()[0])
        value = int(excess[row].nan_to_num(math.inf).argmax())
        text = (
            f"{self._unit} {first + row} is off by {float(error[row, value]):.2g}, rounding to "
            f"{self._dtype_name} explains {float(allowed[row, value]):.2g}"
        )
        self._add(Fault(text, math.inf, int(wrong.sum())))
        return True

    def _compare_still(
        self, base: Tensor, exact: Tensor, written: Tensor, first: int, changes: Sequence[MatrixChange]
    ) -> None:
        """Compare the rows that do not change."""
        if not len(rows := still_rows(changes, base, exact)):
            return
        plain = base[rows].to(torch.float32)
        held = plain.to(self.dtype)
        moved = (held.to(torch.float32) == plain) & (held != written[rows])
        self._add_unchanged(moved.any(1), rows + first)

    def _compare_with_base(self, base: Tensor, exact: Tensor, written: Tensor, first: int) -> None:
        """Report rows that are the base's although dithering would almost certainly have moved a value."""
        rows = (base[:, :PROBED].to(self.dtype) == written[:, :PROBED]).all(1).nonzero()[:, 0]
        rows = rows[(base[rows].to(self.dtype) == written[rows]).all(1)]
        if not len(rows):
            return
        exact = exact[rows]
        # The chance that a value moves is its change divided by the distance of its neighbours.
        chances = (exact - base[rows].to(torch.float32)).abs_().div_(self._info.eps * exact.abs())
        if (wrong := chances.nan_to_num_(0).clamp_(max=1).sum(1) > LOG_ODDS).any():
            text = f"{self._unit} {first + int(rows[wrong][0])} is the base's, without the adapter's change"
            self._add(Fault(text, 1.0, int(wrong.sum())))

    def _add_unchanged(self, moved: Tensor, rows: Tensor) -> None:
        if moved.any():
            text = f"{self._unit} {int(rows[moved][0])} differs from the base's, and no adapter changes it"
            self._add(Fault(text, math.inf, int(moved.sum())))

    def _add(self, fault: Fault) -> None:
        """Keep the worst fault, and count the rows of all."""
        if self._fault is None:
            self._fault = fault
            return
        worst = fault if fault.excess > self._fault.excess else self._fault
        self._fault = Fault(worst.text, worst.excess, self._fault.rows + fault.rows)


@dataclass(frozen=True)
class _Sums:
    """Sums over values of errors times directions: the change first, then what each rank of the adapters adds to it.

    Attributes:
        lost: sums of error x direction.
        learnt: sums of the squared directions.
        aligned: sums of |direction x change|, as far as ranks have them in common.
        variance: of ``lost``, for rounding that keeps the change on average: the sum of its squared terms.
        term: bound of a single term of ``lost``.
        floor: allowed for float32.
    """

    lost: Tensor
    learnt: Tensor
    aligned: Tensor
    variance: Tensor
    term: Tensor
    floor: Tensor

    @classmethod
    def of(
        cls, plain: Tensor, exact: Tensor, written: Tensor, factors: Sequence[tuple[Tensor, Tensor]], eps: float
    ) -> _Sums:
        """Sum over rows [N, I].

        Args:
            plain, exact: the base's and those of base + adapters, in float32.
            factors: of the products that the adapters add to these rows, [N, R] and [R, I].
            eps: of the written dtype.
        """
        change, error = exact - plain, written.to(torch.float32) - exact
        largest, terms = exact.abs().amax(1), error * change
        learnt = change.square().sum()
        term = (largest * torch.maximum(change.amax(1), -change.amin(1))).amax()
        floor = largest.square().sum().sqrt() * learnt.sqrt()
        columns = [torch.stack([terms.sum(), learnt, learnt, terms.square_().sum(), term, floor])[:, None]]
        squared = error.square()
        for up, down in factors:
            products = (up.T @ up) * (down @ down.T)
            columns.append(
                torch.stack([
                    ((error @ down.T) * up).sum(0),
                    products.diag(),
                    products.abs().sum(1),
                    ((squared @ down.T.square()) * up.square()).sum(0),
                    (largest[:, None] * up.abs()).amax(0) * down.abs().amax(1),
                    largest @ up.abs() * torch.linalg.vector_norm(down, dim=1),
                ])
            )  # fmt: skip
        lost, learnt, aligned, variance, term, floor = torch.cat(columns, 1).double()
        return cls(lost, learnt, aligned, variance, eps * term, SUM_FLOOR * math.sqrt(exact.shape[1]) * floor)

    def bound(self) -> Tensor:
        """Bernstein's: larger sums have a probability below exp(-LOG_ODDS)."""
        chance = (2 * LOG_ODDS * self.variance).sqrt() + LOG_ODDS / 3 * self.term
        return chance + SHARE * self.aligned + self.floor

    def excess(self) -> Tensor:
        """Sums divided by their bounds."""
        return torch.where(self.lost == 0, 0, self.lost.abs() / self.bound()).nan_to_num(math.inf)

    def shares(self, number: int) -> str:
        """Describe the share of a direction that was written, and the shares that rounding can leave."""
        lost, learnt, bound = (float(values[number]) for values in (self.lost, self.learnt, self.bound()))
        share, width = 1 + lost / learnt, bound / learnt
        what = "the adapter's change" if number == 0 else f"what rank {number - 1} adds to it"
        return f"{share:.0%} of {what}, rounding leaves {max(0.0, 1 - width):.0%} to {1 + width:.0%}"

    def plus(self, rows: _Sums) -> _Sums:
        """Return the sums over these and more rows."""
        total = {each.name: getattr(self, each.name) + getattr(rows, each.name) for each in fields(self)}
        return _Sums(**total | {"term": torch.maximum(self.term, rows.term)})


def still_rows(changes: Sequence[MatrixChange], base: Tensor, exact: Tensor) -> Tensor:
    """Return the indices of the rows that stay as they are."""
    if len(changes) == 1 and changes[0].is_product and changes[0].up is not None:
        return (changes[0].up == 0).all(1).nonzero()[:, 0]
    return (base.to(torch.float32) == exact).all(1).nonzero()[:, 0]


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors of one dtype are equal bit for bit."""
    first, second = first.contiguous().flatten(), second.contiguous().flatten()
    widest = torch.int64 if first.nbytes % 8 == 0 else torch.int8
    return torch.equal(first.view(widest), second.view(widest))
