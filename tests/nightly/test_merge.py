"""What README and docs/export.md say of merging, on a model that has learnt: merged = adapter, in bfloat16 too."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.nightly.training import Behaviour, behaviour, merge


@pytest.fixture(scope="module")
def trained(small_model: Path, identity: Path, tuned: Path) -> Behaviour:
    return behaviour(small_model, identity, tuned)


def test_training_lowers_the_loss(small_model: Path, identity: Path, trained: Behaviour) -> None:
    assert trained.loss < 0.8 * behaviour(small_model, identity).loss


@pytest.mark.parametrize("flags", [(), ("--layout", "qwen2", "--dtype", "fp32")], ids=["default", "fp32"])
def test_merged_model_answers_as_its_adapter(
    tuned: Path, identity: Path, trained: Behaviour, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    merged = behaviour(merge(tuned, tmp_path / "merged", *flags), identity)
    assert merged.loss == pytest.approx(trained.loss, abs=0.02)
    assert merged.equal(trained) >= 0.85
