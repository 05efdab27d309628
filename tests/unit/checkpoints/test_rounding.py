"""Rounding to 16 bits: neighbours only, right on average, and the same bits however many rows are rounded at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from checkpoints.rounding import _thresholds, round_rows

DTYPES = [torch.bfloat16, torch.float16]


def dithered(exact: Tensor, dtype: torch.dtype, name: str = "w", first_row: int = 0) -> Tensor:
    return round_rows(exact, dtype, "dithered", name, first_row)


def neighbours(exact: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the largest numbers of ``dtype`` up to, and the smallest from ``exact`` on, in float64."""
    nearest = exact.to(dtype)
    below = torch.where(nearest.double() > exact.double(), nearest.nextafter(nearest.new_tensor(-torch.inf)), nearest)
    above = torch.where(nearest.double() < exact.double(), nearest.nextafter(nearest.new_tensor(torch.inf)), nearest)
    return below.double(), above.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-7, 1e-5, 0.05, 100.0])  # float16 has its subnormal numbers below 6e-5
def test_each_value_becomes_a_neighbour_and_the_mean_is_exact(dtype: torch.dtype, size: float) -> None:
    exact = size * torch.randn(400, 1, generator=torch.Generator().manual_seed(0)).expand(400, 512).contiguous()
    rounded = dithered(exact, dtype).double()
    below, above = neighbours(exact, dtype)
    assert ((rounded == below) | (rounded == above)).all()
    error = (rounded - exact.double()).mean(1) / (above - below).clamp(min=1e-30)[:, 0]
    assert error.abs().max() < 0.01, "512 columns of one value: the thresholds of a row are spread evenly"


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_of_the_dtype_stay(dtype: torch.dtype) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype).view(256, 256)
    finite = torch.where(values.isfinite(), values, values.new_tensor(0.0))
    assert torch.equal(dithered(finite.float(), dtype).view(torch.int16), finite.view(torch.int16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_too_large_is_infinite_and_nothing_becomes_nan(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    exact = torch.tensor([[largest, -largest, torch.inf, -torch.inf, 3.39e38 if dtype == torch.bfloat16 else 7e4]])
    rounded = dithered(exact, dtype)
    assert rounded[0, :2].tolist() == [largest, -largest]
    assert rounded[0, 2:4].tolist() == [torch.inf, -torch.inf] and not rounded.isnan().any()
    ones = torch.full((1, 100), -1, dtype=torch.int32).view(torch.float32)  # the NaN that erased memory holds
    assert dithered(ones, dtype).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [48, 2**15])  # of the wide one, 32 rows are rounded at a time
def test_bits_depend_on_name_row_and_column_alone(dtype: torch.dtype, columns: int) -> None:
    exact = torch.randn(37, columns, generator=torch.Generator().manual_seed(1))
    whole = dithered(exact, dtype)
    for step in (1, 5, 36):
        blocks = [dithered(exact[row : row + step], dtype, first_row=row) for row in range(0, 37, step)]
        assert torch.equal(torch.cat(blocks), whole)
    assert not torch.equal(dithered(exact, dtype, "other"), whole)
    assert not torch.equal(dithered(exact, dtype, first_row=1), whole)


def test_a_small_change_is_kept_where_nearest_loses_it() -> None:
    generator = torch.Generator().manual_seed(2)
    base = (0.05 * torch.randn(256, 512, generator=generator)).bfloat16().float()
    change = 2e-5 * torch.randn(256, 512, generator=generator)
    exact = base + change

    def kept(rounded: Tensor) -> float:
        return float(((rounded.float() - base) * change).sum() / change.square().sum())

    assert kept(round_rows(exact, torch.bfloat16, "nearest", "w", 0)) < 0.5
    assert abs(kept(dithered(exact, torch.bfloat16)) - 1) < 0.03


def test_float32_is_not_rounded() -> None:
    exact = torch.randn(3, 4)
    assert torch.equal(dithered(exact, torch.float32), exact)


@pytest.mark.parametrize("columns", [1, 64, 5000])
def test_the_table_of_thresholds_is_small(columns: int) -> None:
    """The elements of a bias or a norm are rows of one column: a table by elements alone would take 4 GiB."""
    assert _thresholds(columns).nbytes < 16 * 2**20
