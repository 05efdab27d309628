"""Tensors of several dtypes, and checks of the checkpoint folders that contain them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from checkpoints.shards import open_checkpoint

TENSORS = {
    "wte": torch.arange(24, dtype=torch.float32).reshape(6, 4),
    "norm": torch.arange(4, dtype=torch.bfloat16),
    "ids": torch.arange(5),
    "head": torch.arange(8, dtype=torch.float16).reshape(2, 4),
}


def assert_contains(folder: Path, expected: dict[str, Tensor]) -> None:
    reader = open_checkpoint(folder)
    assert sorted(reader.names()) == sorted(expected)
    for name, tensor in expected.items():
        assert name in reader
        assert reader.shape(name) == tuple(tensor.shape)
        assert reader.dtype(name) == tensor.dtype
        assert torch.equal(reader.read(name), tensor)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
