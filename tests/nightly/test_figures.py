"""Facts come back, general answers stay, and every method lowers the loss of conversations that it does not train."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.small_model import METHODS, SmallModel
from benchmarks.teach import short_records

STEPS = 20  # of a method's run; benchmarks.small_model takes 40


@pytest.fixture(scope="module")
def small(small_model: Path, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    records = short_records(shared / "corpora" / "alpaca_en_demo.json")
    return SmallModel(small_model, records, tmp_path_factory.mktemp("figures"), STEPS)


def test_taught_facts_come_back_in_other_words_and_general_answers_stay(small: SmallModel) -> None:
    figures = small.facts()
    assert figures["before"]["reproduced"] == figures["before"]["paraphrases_answered"] == 0
    assert figures["after"]["reproduced"] >= 10  # of 12
    assert figures["after"]["paraphrases_answered"] >= 12  # of 24
    assert figures["ratio"] <= 1.03


def test_every_method_lowers_the_loss_of_other_conversations(small: SmallModel) -> None:
    ratios = {name: small.method(name)["ratio"] for name in METHODS}
    assert max(ratios.values()) < 0.995, ratios
