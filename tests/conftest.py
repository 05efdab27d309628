"""Shared fixtures: the golden sets, and models and tokenizers loaded from them."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Before torch is imported, because libgomp reads them once. Threads that spin while waiting slow down parallel runs.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Prepared data is kept for this session only; matplotlib's list of fonts stays in the user's cache.
os.environ.setdefault(
    "MPLCONFIGDIR", os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "matplotlib")
)
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="qwen-tests-cache-")

import pytest
import torch

from tests import fork_server
from tests.golden import REPO, SMALL, Golden

if TYPE_CHECKING:
    from qwen_model.modeling_qwen import QWenLMHeadModel
    from qwen_model.tokenization_qwen import QWenTokenizer

# Before any Hugging Face library is imported; commands that tests start inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
torch.set_num_threads(2)
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)


def pytest_collection_finish() -> None:
    """Let the garbage collector skip what was imported: every Trainer collects, which takes a third of a short run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def environment_of_each_test() -> Iterator[None]:
    with fork_server.restored_environment():
        yield


def shared_folder() -> Path:
    """Return the folder of the recordings outside the repository: ``$QWEN_SHARED``, by default ``../shared``.

    Without it tests are skipped, except in CI, where they fail.
    """
    path = Path(os.environ.get("QWEN_SHARED") or REPO.parent / "shared").resolve()
    if not path.is_dir():
        reason = f"NOT TESTED against the recordings: folder {path} does not exist (set QWEN_SHARED)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path


@pytest.fixture(scope="session")
def shared() -> Path:
    return shared_folder()


@pytest.fixture(scope="session")
def golden_small() -> Path:
    return SMALL


@pytest.fixture(scope="session")
def golden_large(shared: Path) -> Path:
    return shared / "golden"


@pytest.fixture(scope="session", params=["small", "large"])
def any_golden(request: pytest.FixtureRequest) -> Golden:
    """Each golden set in turn: a test with this fixture runs on both."""
    if request.param == "small":
        return Golden("small", SMALL)
    return Golden("large", shared_folder() / "golden")


@pytest.fixture(scope="session")
def tiny_tokenizer(any_golden: Golden) -> QWenTokenizer:
    """The tokenizer of the set's main checkpoint. Shared by tests, which must not change it."""
    from qwen_model.tokenization_qwen import QWenTokenizer

    return QWenTokenizer.from_pretrained(any_golden.tiny)


@pytest.fixture(scope="session")
def tiny_model(any_golden: Golden) -> QWenLMHeadModel:
    """The set's main checkpoint in fp32 and evaluation mode. Shared by tests, which must not change it."""
    from qwen_model.modeling_qwen import QWenLMHeadModel

    return QWenLMHeadModel.from_pretrained(any_golden.tiny, dtype=torch.float32).eval()
