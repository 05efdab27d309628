"""Rehearsed bytes against what is known exactly: parameters, gradients, states, and what a real step keeps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from errors import ConfigError
from planning.rehearsal import COMPONENTS
from tests.unit.planning.shapes import BLOCK_PARAMETERS, WEIGHTS, rehearse_flags, write_config

ADAPTER = 2 * 4 * (2 * 64 + 2 * 48 + 3 * 96)
"""Weights of an adapter of rank 4 on all linear layers of the blocks."""


@pytest.mark.parametrize(("flags", "width"), [("--bf16", 4), ("--optim adamw_torch --pure_bf16", 2)])
def test_all_parameters_have_a_gradient_and_two_moments(tmp_path: Path, flags: str, width: int) -> None:
    rehearsal = rehearse_flags(write_config(tmp_path), flags)
    assert rehearsal.parameters == rehearsal.trained_parameters == WEIGHTS
    tables = sum(tensor.bytes for tensor in rehearsal.tensors if not tensor.is_trained)
    steps = 4 * sum(tensor.is_trained for tensor in rehearsal.tensors)
    assert rehearsal.resident == {
        "weights": width * WEIGHTS + tables,
        "adapter": 0,
        "gradients": width * WEIGHTS,
        "optimizer": 2 * width * WEIGHTS + steps,
    }


@pytest.mark.parametrize(("flags", "frozen", "trained"), [("", 4, 4), ("--fp16", 2, 4), ("--pure_bf16", 2, 2)])
def test_adapter_has_a_gradient_and_two_moments(tmp_path: Path, flags: str, frozen: int, trained: int) -> None:
    rehearsal = rehearse_flags(write_config(tmp_path), f"--use_lora --lora_r 4 {flags}")
    assert (rehearsal.parameters, rehearsal.trained_parameters) == (WEIGHTS, ADAPTER)
    resident = rehearsal.resident
    assert resident["adapter"] == resident["gradients"] == trained * ADAPTER
    assert resident["weights"] == pytest.approx(frozen * WEIGHTS, abs=200)  # rotary frequencies
    assert resident["optimizer"] == pytest.approx(2 * trained * ADAPTER, rel=0.02)


def test_components_sum_to_the_peak_of_every_moment(tmp_path: Path) -> None:
    rehearsal = rehearse_flags(write_config(tmp_path), "--use_lora --bf16")
    assert tuple(rehearsal.components) == COMPONENTS
    assert sum(rehearsal.components.values()) == rehearsal.peak_bytes
    assert rehearsal.peak_bytes == max(moment.bytes for moment in rehearsal.moments.values())
    parts = {f"{phase}, block {block}" for phase in ("forward", "backward") for block in range(2)}
    assert parts | {"loss", "clipping", "optimizer"} <= rehearsal.moments.keys()


def test_matrix_products_are_counted(tmp_path: Path) -> None:
    rehearsal = rehearse_flags(write_config(tmp_path), "--gradient_checkpointing False", (64,))
    linear = 2 * 64 * 2 * BLOCK_PARAMETERS + 3 * 2 * 63 * 768 * 32  # the lean loss computes its gradients at once
    attention = 2 * 2 * (2 * 64 * 64 * 32)
    assert rehearsal.flops_forward == linear + attention
    assert rehearsal.flops_backward == pytest.approx(2 * 2 * 64 * 2 * BLOCK_PARAMETERS + 2.5 * attention)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is not supported"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"hidden_size": -1}, "config.json"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"hidden_size": "wide"}, "config.json"),
        ({"hidden_act": "foo"}, "hidden_act 'foo' is unknown"),
    ],
)
def test_config_that_cannot_be_used_is_refused(tmp_path: Path, values: dict[str, object], message: str) -> None:
    folder = write_config(tmp_path, **values)
    with pytest.raises(ConfigError, match=message) as refusal:
        rehearse_flags(folder, "--use_lora")
    assert str(folder) in str(refusal.value) and str(refusal.value).count("config.json: ") <= 1


def test_contradictory_config_of_qwen_v1_is_named_once(tmp_path: Path) -> None:
    folder = write_config(tmp_path, "qwen", num_attention_heads=2)
    place = re.escape(f"--model_name_or_path {folder / 'config.json'}: kv_channels 8 x ")
    with pytest.raises(ConfigError, match=f"^{place}"):
        rehearse_flags(folder, "--use_lora")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ('--lora_rank_pattern {"nope":4}', "--lora_rank_pattern: 'nope' matches no adapted layer"),
        ('--lora_alpha_pattern {"q_proj":4,"proj":4}', "--lora_alpha_pattern: 'proj' matches no adapted layer"),
    ],
)
def test_pattern_that_matches_no_layer_is_refused_without_weights(tmp_path: Path, flags: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        rehearse_flags(write_config(tmp_path), f"--use_lora {flags}")


def test_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no config\.json"):
        rehearse_flags(tmp_path, "--use_lora")
