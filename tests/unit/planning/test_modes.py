"""What a rehearsal keeps in each mode: dtypes of activations, packed weights, trained rows, checkpointing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from errors import ConfigError
from planning.fake_run import run_step
from planning.model import read_checkpoint
from planning.rehearsal import BatchShape
from tests.unit.planning.shapes import rehearse_flags, write_config
from training.config.parsing import parse_args

WIDE = {"hidden_size": 128, "intermediate_size": 256}
GROUPS = {"bits": 4, "group_size": 128}
LINEAR = 2 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256)
"""Weights of the linear layers of a wide model."""


@pytest.mark.parametrize("flags", ["--use_lora --bf16", "--bf16"])
def test_blocks_keep_no_float32_states_in_bfloat16_runs(tmp_path: Path, flags: str) -> None:
    args = parse_args(["--model_name_or_path", str(write_config(tmp_path)), *flags.split()])
    args.trainer["gradient_checkpointing"] = False
    step = run_step(args, read_checkpoint(args), BatchShape((100, 100), 150), None, "cuda")
    kept = step.memory.kept_bytes()
    in_blocks = {place: sizes for place, sizes in kept.items() if place.startswith("model.layers.")}
    assert in_blocks
    per_row = 4096  # float32 values of each token and head: the scale of a norm, a sum of attention weights
    residual = 2 * 200 * 32 * 4 if flags == "--bf16" else 0  # the two sums of a block, beside float32 weights
    for place, sizes in in_blocks.items():
        assert sizes.get(torch.float32, 0) <= max(per_row, residual), (place, sizes)
        assert torch.float64 not in sizes


@pytest.mark.parametrize(
    ("quantization", "stored"),
    [
        (None, LINEAR / 2 + LINEAR / 64 * (1 + 4 / 256) + 7 * 2 * 4 * 272),
        ({"quant_method": "gptq", **GROUPS}, LINEAR / 2 + LINEAR / 128 * 2.5 + 4 * 2 * (6 * 128 + 256)),
        ({"quant_method": "awq", "version": "gemm", **GROUPS}, LINEAR / 2 + LINEAR / 128 * 2.5),
    ],
)  # fmt: skip
def test_packed_weights_have_their_stored_size(
    tmp_path: Path, quantization: dict[str, object] | None, stored: float
) -> None:
    config = {} if quantization is None else {"quantization_config": quantization}
    plain = rehearse_flags(write_config(tmp_path / "plain", **WIDE), "--use_lora --bf16")
    packed = rehearse_flags(write_config(tmp_path / "packed", **WIDE, **config), "--use_lora --bf16 --q_lora")
    assert packed.parameters == plain.parameters
    assert plain.resident["weights"] - packed.resident["weights"] == pytest.approx(2 * LINEAR - stored, abs=100)
    backward = packed.moments["backward, block 0"].components
    assert backward["workspace"] >= 2 * 128 * 256  # a dequantised layer, for one product at a time


def test_eight_bits_and_dora_on_packed_weights_are_refused_by_name(tmp_path: Path) -> None:
    folder = write_config(tmp_path)
    for flag in ("--load_in_8bit", "--use_dora"):
        with pytest.raises(ConfigError, match=f"{flag}.* cannot be rehearsed"):
            rehearse_flags(folder, f"--use_lora --q_lora {flag}")
    folder = write_config(tmp_path / "8bit", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(ConfigError, match=r"^--model_name_or_path .*config\.json: load_in_8bit cannot be rehearsed"):
        rehearse_flags(folder, "--use_lora --q_lora")


def test_trained_tokens_cost_two_rows_and_trained_embeddings_all(tmp_path: Path) -> None:
    folder = write_config(tmp_path)
    none, tokens, full = (
        rehearse_flags(folder, f"--use_lora --bf16 --trainable_embeddings {mode}", device_type="cuda")
        for mode in ("none", "chatml_tokens", "full")
    )
    assert tokens.trained_parameters - none.trained_parameters == 2 * 2 * 32
    assert full.trained_parameters - none.trained_parameters == 2 * 768 * 32
    assert tokens.peak_bytes < none.peak_bytes * 1.05 < full.peak_bytes


def test_checkpointing_keeps_fewer_activations_for_more_operations(tmp_path: Path) -> None:
    folder = write_config(tmp_path, num_hidden_layers=4)
    flags = "--use_lora --bf16 --gradient_checkpointing"
    every, second, none, offloaded = (
        rehearse_flags(folder, f"{flags} {more}", (200, 200), device_type="cuda")
        for more in (
            "True", 'True --gradient_checkpointing_kwargs {"every_n_layers":2}', "False",
            'True --gradient_checkpointing_kwargs {"offload":true}',
        )
    )  # fmt: skip
    kept = [each.moments["loss"].components["activations"] for each in (offloaded, every, second, none)]
    assert kept == sorted(kept) and kept[1] < kept[2] / 2
    assert kept[1] - kept[0] == 3 * 2 * 400 * 32  # inputs of the blocks but the first, which is the embedding's output
    assert 0.5 < (every.flops_backward - none.flops_backward) / none.flops_forward < 1  # all but the loss
    assert none.flops_backward < second.flops_backward < every.flops_backward
    assert offloaded.flops_backward == every.flops_backward
