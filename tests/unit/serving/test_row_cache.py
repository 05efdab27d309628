"""Rows of a cache that join, leave and lose columns keep what they contain."""

from __future__ import annotations

import torch

from serving.row_cache import RowLayer


def column(rows: int, value: float) -> torch.Tensor:
    return torch.full((rows, 2, 1, 3), value)


def test_columns_and_rows_come_and_go() -> None:
    layer, other = RowLayer(), RowLayer()
    for number in range(1, 101):  # more than a buffer has room for
        keys, values = layer.update(column(2, number), column(2, -number))
    assert keys.shape == (2, 2, 100, 3) and keys[1, 1, :, 0].tolist() == list(range(1, 101))
    assert torch.equal(values, -keys) and layer.get_seq_length() == 100
    layer.cut_left(98)
    other.update(torch.full((1, 2, 5, 3), 7.0), torch.full((1, 2, 5, 3), -7.0))
    layer.join(other, 3, 0)
    keys, values = layer.update(column(3, 8.0), column(3, -8.0))
    assert keys[:, 0, :, 0].tolist() == [[0, 0, 0, 99, 100, 8]] * 2 + [[7, 7, 7, 7, 7, 8]]
    layer.batch_select_indices(torch.tensor([0, 2]))
    layer.cut_left(1)
    keys, values = layer.update(column(2, 9.0), column(2, -9.0))
    assert keys[:, 1, :, 2].tolist() == [[0, 0, 99, 100, 8, 9], [7, 7, 7, 7, 8, 9]] and torch.equal(values, -keys)
