"""Products are the same with both libraries, for matrices and transposed views of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwen_model import products
from qwen_model.products import add_product, product


def matrix(rows: int, columns: int, is_transposed: bool = False) -> Tensor:
    return torch.randn(columns, rows).T if is_transposed else torch.randn(rows, columns)


@pytest.mark.parametrize("is_large", [True, False])
@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True)])
def test_results_are_those_of_torch(
    is_large: bool, transposed: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "LARGE", 1 if is_large else 2**60)
    left, right = matrix(30, 70, transposed[0]), matrix(70, 50, transposed[1])
    bias, total = torch.randn(50), matrix(30, 50)
    torch.testing.assert_close(product(left, right), left @ right)
    torch.testing.assert_close(product(left, right, bias), left @ right + bias)
    torch.testing.assert_close(add_product(total.clone(), left, right), total + left @ right)


def test_matrices_with_gaps_are_multiplied_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN multiplies them with its reference kernel."""
    monkeypatch.setattr(products, "LARGE", 1)
    monkeypatch.setattr(products, "_onednn", lambda: pytest.fail)
    left, right = matrix(30, 70), matrix(70, 50)
    assert torch.equal(product(left, right[:, 5:20]), left @ right[:, 5:20])
    assert torch.equal(product(left[:, :20], right[:20]), left[:, :20] @ right[:20])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_multiplied_by_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "LARGE", 1)
    left, right = matrix(3, 7).to(dtype), matrix(7, 5).to(dtype)
    assert torch.equal(product(left, right), left @ right)
