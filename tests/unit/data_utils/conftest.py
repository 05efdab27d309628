"""Fixtures of the property tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chats import Subject, load_subject


@pytest.fixture(scope="module", params=["small", "real", "fast"])
def subject(request: pytest.FixtureRequest, golden_small: Path, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    golden = request.getfixturevalue("golden_large") if request.param == "real" else golden_small
    return load_subject(request.param, golden, tmp_path_factory.mktemp("tokenizer"))
