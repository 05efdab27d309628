"""NEFTune's noise: by the length of each sample, in training only, and only within the block."""

from __future__ import annotations

import pytest
import torch

from loading.checkpoint import load_checkpoint, load_model
from qwen_model.sample_attention import take_rows
from tests.models import TINY
from training.noise import embedding_noise, noise_like


def test_samples_of_a_row_have_noise_by_their_own_lengths() -> None:
    row, alpha = torch.zeros(1, 110, 64), 5.0
    noise = noise_like(row, alpha, torch.tensor([0, 10, 110], dtype=torch.int32))
    for place, length in ((slice(0, 10), 10), (slice(10, 110), 100)):
        limit = alpha / (length * 64) ** 0.5
        values = noise[0, place]
        assert 0.95 * limit < values.abs().max() <= limit
        assert values.mean().abs() < 0.1 * limit
    padded = noise_like(torch.zeros(2, 100, 64), alpha, None).abs().max()
    assert 0.95 < padded * (100 * 64) ** 0.5 / alpha <= 1


@pytest.mark.parametrize("alpha", [None, 0.0, 5.0])
def test_noise_is_added_in_training_within_the_block(alpha: float | None) -> None:
    model = load_model(load_checkpoint(str(TINY)), torch.float32)
    take_rows(model)
    starts = torch.tensor([0, 3, 10], dtype=torch.int32)
    batch = {
        "input_ids": torch.arange(10)[None], "position_ids": torch.tensor([[*range(3), *range(7)]]),
        "sequence_lengths": (3, 7), "cu_seq_lens_q": starts, "cu_seq_lens_k": starts,
    }  # fmt: skip

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return torch.as_tensor(model(**batch).logits)

    expected = logits()
    with embedding_noise(model, alpha):
        assert torch.equal(model.train() and logits(), expected) is not bool(alpha)
        assert torch.equal(model.eval() and logits(), expected)
    assert torch.equal(model.train() and logits(), expected)
