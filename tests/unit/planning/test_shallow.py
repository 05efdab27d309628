"""Estimates from fewer blocks are those of the rehearsal of all blocks."""

from __future__ import annotations

from pathlib import Path

import pytest

from planning.model import read_checkpoint
from planning.rehearsal import BatchShape, rehearse
from planning.shallow import Blocks, can_be_shallow, depths, estimate, find_blocks
from tests.models import DELTA_NETS
from tests.unit.planning.shapes import write_config
from training.config.parsing import parse_args

_EVERY = "--gradient_checkpointing --gradient_checkpointing_kwargs"


USUAL = [
    ("--use_lora --bf16", "cpu"),
    ("--use_lora --bf16 --q_lora", "cuda"),
    ("--bf16 --gradient_checkpointing False", "cpu"),
    (f'--use_lora --bf16 {_EVERY} {{"every_n_layers":4}}', "cuda"),
]
OTHERS = [
    ("--use_lora --bf16 --trainable_embeddings full --gradient_checkpointing False", "cuda"),
    ("--bf16 --per_device_train_batch_size 1 --gradient_accumulation_steps 1 --gradient_checkpointing False", "cuda"),
    ("--pure_bf16 --optim adamw_bnb_8bit", "cuda"),
    (f'--bf16 {_EVERY} {{"every_n_layers":2}}', "cpu"),
    (f'--use_lora --bf16 {_EVERY} {{"offload":true}}', "cuda"),
    ("--use_lora --bf16 --eval_strategy steps --eval_steps 1 --per_device_eval_batch_size 8", "cuda"),
]


@pytest.mark.parametrize(
    ("flags", "device_type"), [*USUAL, *(pytest.param(*case, marks=pytest.mark.long) for case in OTHERS)]
)
def test_an_estimate_is_the_rehearsal_of_all_blocks(tmp_path: Path, flags: str, device_type: str) -> None:
    folder = write_config(tmp_path, num_hidden_layers=15, hidden_size=128, intermediate_size=256)
    compare(folder, flags, device_type, Blocks(15))


def test_an_estimate_of_blocks_of_two_kinds(tmp_path: Path) -> None:
    types = ["linear_attention", "full_attention"] * 6
    folder = write_config(tmp_path, "qwen3_5_text", **DELTA_NETS | {"num_hidden_layers": 12, "layer_types": types})
    compare(folder, "--use_lora --bf16", "cuda", Blocks(12, 2))


def compare(folder: Path, flags: str, device_type: str, blocks: Blocks) -> None:
    """Compare an estimate with the rehearsal of all blocks."""
    args = parse_args(["--model_name_or_path", str(folder), *flags.split(" ")])
    evaluation = BatchShape((64,) * 8, 500) if "eval" in flags else None
    batch = BatchShape((64, 64), 120)
    full = rehearse(args, batch, device_type=device_type, evaluation=evaluation)
    assert find_blocks(read_checkpoint(args).config) == blocks
    assert can_be_shallow(args, full, blocks) and depths(args, blocks)[1] < blocks.count
    found = estimate(args, batch, blocks, device_type=device_type, evaluation=evaluation)
    rounding = 4 * 512  # of CUDA's allocator
    assert found.peak_bytes == pytest.approx(full.peak_bytes, abs=rounding)
    assert found.components == pytest.approx(full.components, abs=rounding)
    assert found.resident == full.resident and found.parameters == full.parameters
    assert (found.flops_forward, found.flops_backward) == (full.flops_forward, full.flops_backward)
    assert sum(each.bytes for each in found.tensors) == sum(each.bytes for each in full.tensors)
    assert found.trained_parameters == full.trained_parameters


def test_blocks_that_differ_are_rehearsed_one_by_one(tmp_path: Path) -> None:
    folder = write_config(tmp_path, num_hidden_layers=12)
    flags = ["--model_name_or_path", str(folder), "--bf16", "--use_lora"]
    batch = BatchShape((64,), 60)
    for more, is_alike in ((), True), (("--lora_target_modules", "layers.3.mlp.up_proj"), False):
        args = parse_args([*flags, *more])
        assert can_be_shallow(args, rehearse(args, batch), Blocks(12)) == is_alike
    sliding = {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 6}
    found = []
    for values in ({}, sliding):
        args = parse_args(["--model_name_or_path", str(write_config(tmp_path, num_hidden_layers=12, **values))])
        found.append(find_blocks(read_checkpoint(args).config))
    assert found == [Blocks(12), Blocks()]
