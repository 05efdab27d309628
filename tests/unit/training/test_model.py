"""The precision of the weights of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.commands import finetune_here
from tests.models import TINY, copy_in_bfloat16, write_conversations


@pytest.mark.parametrize(
    ("base", "flags", "frozen", "trained"),
    [
        ("fp32", "", None, torch.float32),
        ("bf16", "", None, torch.float32),
        ("bf16", "--bf16", None, torch.float32),
        ("fp32", "--pure_bf16", None, torch.bfloat16),
        ("bf16", "--use_lora", torch.float32, torch.float32),
        ("fp32", "--use_lora --bf16", torch.bfloat16, torch.float32),
        ("bf16", "--use_lora --bf16 --trainable_embeddings full", torch.bfloat16, torch.float32),
        ("bf16", "--use_lora --bf16 --trainable_embeddings chatml_tokens", torch.bfloat16, torch.float32),
        ("bf16", "--use_lora --pure_bf16", torch.bfloat16, torch.bfloat16),
        ("fp32", "--use_lora --pure_bf16 --trainable_embeddings full", torch.bfloat16, torch.bfloat16),
    ],
)
def test_what_trains_is_float32_and_what_is_frozen_takes_the_compute_dtype(
    tmp_path: Path, base: str, flags: str, frozen: torch.dtype | None, trained: torch.dtype
) -> None:
    checkpoint = TINY if base == "fp32" else copy_in_bfloat16(tmp_path / "base")
    run = finetune_here(
        "--model_name_or_path", checkpoint, "--data_path", write_conversations(tmp_path / "train.json"),
        "--output_dir", tmp_path / "out", "--max_steps", 1, "--logging_steps", 1, "--save_strategy", "no",
        *flags.split(),
    )  # fmt: skip
    parameters = list(run.model.parameters())
    assert {p.dtype for p in parameters if p.requires_grad} == {trained}
    assert {p.dtype for p in parameters if not p.requires_grad} == (set() if frozen is None else {frozen})
    assert run.losses()[0] == pytest.approx(7.4, abs=0.1)
