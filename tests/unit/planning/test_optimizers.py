"""States whose sizes are computed, and optimizers that cannot be rehearsed."""

from __future__ import annotations

from pathlib import Path

import pytest

from errors import ConfigError
from tests.unit.planning.shapes import WEIGHTS, rehearse_flags, write_config


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "adamw_torch_4bit"])
def test_states_of_large_parameters_are_quantised_in_blocks(tmp_path: Path, optimizer: str) -> None:
    folder = write_config(tmp_path, hidden_size=64, intermediate_size=128)
    rehearsal = rehearse_flags(folder, f"--optim {optimizer}", device_type="cpu")
    number, bytes_each, block, keeps_embedding = {
        "adamw_8bit": (2, 1, 256, True), "adamw_torch_4bit": (2, 0.5, 128, False),
    }[optimizer]  # fmt: skip
    expected = 0
    for tensor in rehearsal.tensors:
        if tensor.is_trained:
            full = tensor.elements < 4096 or (keeps_embedding and "embed" in tensor.name)
            scales = -(-tensor.elements // block) * 4
            expected += number * (4 * tensor.elements if full else int(tensor.elements * bytes_each) + scales)
    assert rehearsal.resident["optimizer"] == expected < 0.8 * 2 * 4 * rehearsal.trained_parameters


def test_paged_states_are_not_on_the_device(tmp_path: Path) -> None:
    folder = write_config(tmp_path, vocab_size=4096, tie_word_embeddings=True)
    paged, plain = (rehearse_flags(folder, f"--optim {kind}adamw_8bit").resident for kind in ("paged_", ""))
    assert plain["optimizer"] - paged["optimizer"] == 2 * 4 * 4096 * 32  # the embedding, in 32 bits


def test_factors_of_adafactor_are_rows_and_columns(tmp_path: Path) -> None:
    rehearsal = rehearse_flags(write_config(tmp_path), "--optim adafactor")
    assert rehearsal.resident["optimizer"] < WEIGHTS / 4


@pytest.mark.parametrize(
    ("optimizer", "word"), [("galore_adamw", "cannot be rehearsed"), ("grokadamw", "not installed")]
)
def test_others_are_refused_by_name(tmp_path: Path, optimizer: str, word: str) -> None:
    with pytest.raises(ConfigError, match=rf"--optim {optimizer}.*{word}"):
        rehearse_flags(write_config(tmp_path), f"--optim {optimizer}")
