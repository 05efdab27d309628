"""Checks before a merge: adapters that do not fit their base are refused, incomplete ones are warned about."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.adapters import EMBEDDING, HEAD, Change, assert_refused, make_adapter, make_base, plan, rewrite


@pytest.fixture(scope="module")
def plain_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("fold") / "base")


@pytest.fixture
def plain_adapter(plain_base: Path, tmp_path: Path) -> Path:
    return make_adapter(plain_base, tmp_path / "adapter", target_modules=["q_proj"])


QUERY = "base_model.model.model.layers.1.self_attn.q_proj"


def with_tensor(name: str, tensor: Tensor) -> Change:
    return lambda tensors: tensors | {name: tensor}


@pytest.mark.parametrize(
    ("name", "tensor", "match"),
    [
        (f"{QUERY}.lora_A.weight", torch.zeros(4, 15), r"lora_A\.weight has shape \(4, 15\), .* ask for \(4, 16\)"),
        (f"{QUERY}.lora_A.weight", torch.zeros(3, 16), r"lora_A\.weight has shape \(3, 16\), .* ask for \(4, 16\)"),
        (f"{QUERY}.lora_B.weight", torch.zeros(0), r"lora_B\.weight has shape \(0,\), .* ask for \(16, 4\)"),
        (f"{QUERY}.lora_B.weight", torch.full((16, 4), torch.nan), r"lora_B\.weight holds NaN or infinity"),
        (f"{QUERY}.lora_A.weight", torch.full((4, 16), -torch.inf), r"lora_A\.weight holds NaN or infinity"),
        (f"{QUERY}.lora_A.other.weight", torch.zeros(4, 16), r"q_proj\.lora_A.* have the same role"),
        (f"{QUERY}.base_layer.bias", torch.zeros(15), r"base_layer\.bias has shape \(15,\), .* ask for \(16,\)"),
        (f"{QUERY}.lora_magnitude_vector", torch.zeros(16), r"use_dora is False but .*q_proj\.weight has"),
        (f"{QUERY}.lora_diag", torch.zeros(4), r"q_proj\.lora_diag fits no tensor of the base"),
        (f"{QUERY}.token_adapter.trainable_tokens_delta", torch.zeros(1, 16), r"trainable_token_indices .* lacks "),
        ("base_model.model.model.layers.2.mlp.up_proj.lora_A.weight", torch.zeros(4, 16), r"without its lora_B"),
        ("base_model.model.model.layers.2.mlp.up_proj.weight", torch.zeros(24, 16), r"layers\.2\..*fits no tensor"),
        ("base_model.model.score.weight", torch.zeros(2, 16), r"score\.weight fits no tensor of the base"),
        ("model.layers.0.mlp.up_proj.weight", torch.zeros(24, 16), r"is not the name of a LoRA tensor"),
        ("base_model.model.lm_head.weight", torch.zeros(41, 16), r"has shape \(41, 16\), .* ask for \(40, 16\)"),
    ],
)
def test_tensor_that_does_not_fit_is_refused_by_name(
    plain_base: Path, plain_adapter: Path, name: str, tensor: Tensor, match: str
) -> None:
    rewrite(plain_adapter, with_tensor(name, tensor))
    assert_refused(plain_base, plain_adapter, match)


def test_lora_on_a_vector_is_refused(plain_base: Path, plain_adapter: Path) -> None:
    norm = {f"base_model.model.model.norm.lora_{side}.weight": torch.zeros(4, 16) for side in "AB"}
    rewrite(plain_adapter, lambda tensors: tensors | norm)
    assert_refused(plain_base, plain_adapter, r"model\.norm\.weight has shape \(16,\)")


def test_parameter_trained_in_two_ways_is_refused(plain_base: Path, plain_adapter: Path) -> None:
    rows = with_tensor(f"{QUERY}.token_adapter.trainable_tokens_delta", torch.zeros(1, 16))
    rewrite(plain_adapter, rows, trainable_token_indices=[1])
    assert_refused(plain_base, plain_adapter, r"q_proj\.weight is trained in two ways \(lora_A, lora_B, rows\)")


def test_dora_without_magnitude_is_refused(plain_base: Path, plain_adapter: Path) -> None:
    rewrite(plain_adapter, use_dora=True)
    assert_refused(
        plain_base, plain_adapter, r"use_dora is True but model\.layers\.0\.self_attn\.q_proj\.weight has lora_A"
    )


@pytest.mark.parametrize("indices", [[1, 40], [-1, 2], [1, 2, 3]])
def test_token_indices_outside_the_vocabulary_are_refused(plain_base: Path, tmp_path: Path, indices: list[int]) -> None:
    adapter = make_adapter(plain_base, tmp_path / "a", target_modules=["q_proj"], trainable_token_indices=[1, 2])
    rewrite(adapter, trainable_token_indices=indices)
    assert_refused(plain_base, adapter, r"ask for \(3, 16\)" if len(indices) == 3 else r"ids outside of 0\.\.39")


# ------------------------------------------------------------------------------------------------------------ warnings


def warnings_of(base: Path, adapter: Path, caplog: pytest.LogCaptureFixture) -> str:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        plan(base, adapter)
    return " ".join(record.getMessage() for record in caplog.records)


def test_missing_trained_module_is_warned_about(
    plain_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    modules = ["embed_tokens", "lm_head", "score"]
    adapter = make_adapter(plain_base, tmp_path / "a", target_modules=["q_proj"], modules_to_save=modules)
    assert warnings_of(plain_base, adapter, caplog) == "", "the base has no module named score"
    rewrite(adapter, lambda tensors: {name: tensor for name, tensor in tensors.items() if "embed" not in name})
    message = warnings_of(plain_base, adapter, caplog)
    assert "INCOMPLETE" in message and f"Missing: {EMBEDDING}." in message and "checkpoint-*" in message
    rewrite(adapter, lambda tensors: {name: tensor for name, tensor in tensors.items() if "lora" in name})
    assert f"Missing: {HEAD}, {EMBEDDING}." in warnings_of(plain_base, adapter, caplog)


@pytest.mark.parametrize(
    ("tied", "tokens", "dropped", "missing"),
    [
        (False, [1], "", None),
        (False, [1], "embed_tokens", "the trained rows of the input embedding"),
        (False, {"embed_tokens": [1], "lm_head": [1]}, "", None),
        (False, {"embed_tokens": [1], "lm_head": [1]}, "lm_head", "the trained rows of lm_head"),
        (True, {"embed_tokens": [1], "lm_head": [1]}, "", None),
        (True, [1], "embed_tokens", "the trained rows of the input embedding"),
    ],
)
def test_missing_token_rows_are_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, tied: bool, tokens: Any, dropped: str, missing: str | None
) -> None:
    base = make_base(tmp_path / "base", tied=tied)
    adapter = make_adapter(base, tmp_path / "a", target_modules=["q_proj"], trainable_token_indices=tokens)
    if dropped:
        rewrite(adapter, lambda tensors: {name: tensor for name, tensor in tensors.items() if dropped not in name})
    message = warnings_of(base, adapter, caplog)
    assert f"Missing: {missing}." in message if missing else message == ""
