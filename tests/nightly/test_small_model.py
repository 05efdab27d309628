"""The small model speaks English, and both layouts say the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models import write_conversations
from tests.nightly.training import behaviour


def test_both_layouts_give_the_same_answers(small_model: Path, small_qwen: Path, tmp_path: Path) -> None:
    """With a system message, because the layouts have different ones for conversations without one."""
    questions = ("What is the capital of France?", "Name three colours.", "How many days are in a week?")
    data = write_conversations(
        tmp_path / "data.json", [[("user", each), ("assistant", "Paris.")] for each in questions]
    )
    ours, theirs = (
        behaviour(folder, data, system="You are a helpful assistant.") for folder in (small_model, small_qwen)
    )
    assert "Paris" in ours.answers[0]
    assert ours.answers == theirs.answers
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-3)
