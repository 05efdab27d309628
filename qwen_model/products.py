"""Matrix products for autograd functions, through the faster library where there are two.

On CPUs torch multiplies float32 with MKL. oneDNN, which torch uses for 16 bits, is 5 to 30 % faster from about the size
of a block's layer on. It compiles a kernel for each new shape, which takes as long as a small product does. For
matrices with gaps, such as some columns of another one, it has only its reference kernel: thousands of times slower.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

LARGE = 2**26
"""Multiplications of a float32 product that oneDNN computes."""


def product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``left @ right``, [N, K] times [K, M], plus ``bias`` [M]."""
    if _is_for_onednn(left, right):
        result: Tensor = _onednn()(left, right.T, bias, "none", [], "")
        return result
    return torch.mm(left, right) if bias is None else torch.addmm(bias, left, right)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Add ``left @ right`` to ``total``, in place."""
    if _is_for_onednn(left, right):
        return total.add_(product(left, right))
    return total.addmm_(left, right)


def _is_for_onednn(left: Tensor, right: Tensor) -> bool:
    is_large = left.shape[0] * right.numel() >= LARGE and left.dtype == torch.float32 and left.device.type == "cpu"
    return is_large and _is_dense(left) and _is_dense(right) and _onednn() is not None


def _is_dense(matrix: Tensor) -> bool:
    return matrix.is_contiguous() or matrix.T.is_contiguous()


@cache
def _onednn() -> Any:
    """Return oneDNN's product as torch's compiler calls it; ``None`` if torch is built without."""
    return torch.ops.mkldnn._linear_pointwise if torch.backends.mkldnn.is_available() else None
