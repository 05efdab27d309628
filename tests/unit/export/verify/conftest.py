"""Fixtures for the tests of export.verify."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def small_row_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read embedding and head in several blocks of rows, as those of real models are."""
    monkeypatch.setattr("checkpoints.source.BLOCK_ELEMENTS", 100 * 32)
