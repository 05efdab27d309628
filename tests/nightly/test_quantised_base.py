"""An adapter trained on NF4: merged onto the rounded base it is what was trained, onto the unrounded one it is not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.commands import run_well
from tests.nightly.training import Behaviour, behaviour, merge, tune


@pytest.fixture(scope="module")
def adapter(small_model: Path, identity: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tune(small_model, identity, tmp_path_factory.mktemp("nf4") / "adapter", "--use_lora", "--q_lora")


@pytest.fixture(scope="module")
def trained(small_model: Path, identity: Path, adapter: Path) -> Behaviour:
    """The adapter on the base quantised while loading."""
    return behaviour(small_model, identity, adapter)


@pytest.mark.parametrize(("dtype", "equal"), [("fp32", 0.95), ("bf16", 0.85)])
def test_matched_merge_answers_as_the_adapter(
    identity: Path, adapter: Path, trained: Behaviour, tmp_path: Path, dtype: str, equal: float
) -> None:
    """In bfloat16 the rounded base is rounded again: NF4's values need more digits than it has."""
    merged = behaviour(merge(adapter, tmp_path / "merged", "--match_quantised_base", "--dtype", dtype), identity)
    assert merged.loss == pytest.approx(trained.loss, abs=0.02)
    assert merged.equal(trained) >= equal


def test_plain_merge_says_what_the_loss_becomes(
    identity: Path, adapter: Path, trained: Behaviour, tmp_path: Path
) -> None:
    output = tmp_path / "merged"
    log = run_well("merge_lora.py", "--adapter", adapter, "--output", output, timeout=900).stderr
    said = re.search(r"the loss is ([\d.]+) instead of ([\d.]+)", log)
    assert said and "--match_quantised_base" in log
    measured = behaviour(output, identity).loss - trained.loss
    assert measured > 0.05 and float(said[1]) > float(said[2])
