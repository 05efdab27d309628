"""Fixtures that all tests share: the golden sets and the models and tokenizers loaded from them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

# Before torch is imported: libgomp reads them once. Threads that spin while they wait make parallel runs crawl.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

from tests.golden import REPO, SMALL, Golden

if TYPE_CHECKING:
    from qwen_model.modeling_qwen import QWenLMHeadModel
    from qwen_model.tokenization_qwen import QWenTokenizer

# Before any Hugging Face library is imported, and inherited by the commands that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
torch.set_num_threads(2)


def shared_folder() -> Path:
    """The folder with the large golden set: ``$QWEN_SHARED``, by default ``shared`` beside the repository."""
    path = Path(os.environ.get("QWEN_SHARED") or REPO.parent / "shared").resolve()
    if not path.is_dir():
        reason = f"NOT TESTED against the large golden set: there is no folder {path} (set QWEN_SHARED)"
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
    """Each golden set in turn: a test that takes it runs on both."""
    if request.param == "small":
        return Golden("small", SMALL)
    return Golden("large", shared_folder() / "golden")


@pytest.fixture(scope="session")
def tiny_tokenizer(any_golden: Golden) -> QWenTokenizer:
    """The tokenizer of the set's main checkpoint. Shared: do not change it."""
    from qwen_model.tokenization_qwen import QWenTokenizer

    return QWenTokenizer.from_pretrained(any_golden.tiny)


@pytest.fixture(scope="session")
def tiny_model(any_golden: Golden) -> QWenLMHeadModel:
    """The set's main checkpoint in fp32 and in evaluation mode. Shared: do not change it."""
    from qwen_model.modeling_qwen import QWenLMHeadModel

    return QWenLMHeadModel.from_pretrained(any_golden.tiny, dtype=torch.float32).eval()
