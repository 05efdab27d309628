"""The reference computes what every kind of adapter does: correct merges of it pass."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.verification import (
    assert_passes,
    load_peft_model,
    make_adapter,
    make_base,
    merge,
    verify,
    weighted,
)

EMBEDDING = {"qwen": "wte", "qwen2": "embed_tokens", "qwen3": "embed_tokens"}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "large": {"size": 1.0},
    "dora": {"use_dora": True},
    "biases": {"bias": "all", "use_rslora": True},
    "bias of B": {"lora_bias": True},
    "embedding and head in full": {"modules_to_save": ["EMBEDDING", "lm_head"]},
    "a norm in full": {"modules_to_save": ["NORM"]},
    "trained tokens": {"trainable_token_indices": {"EMBEDDING": [700, 3, 250]}},
    "trained tokens of both": {"trainable_token_indices": {"EMBEDDING": [700, 3], "lm_head": [5]}},
    "dora on embedding and head": {"target_modules": ["EMBEDDING", "lm_head"], "use_dora": True},
}


def options_of(kind: str, family: str) -> dict[str, Any]:
    text = json.dumps(KINDS[kind]).replace("EMBEDDING", EMBEDDING[family])
    options: dict[str, Any] = json.loads(text.replace("NORM", "ln_f" if family == "qwen" else "model.norm"))
    if kind == "bias of B":
        options["target_modules"] = ["c_attn"] if family == "qwen" else ["q_proj", "v_proj"]
    return options


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "dtype"), [("qwen", "float16"), ("qwen2", "bfloat16"), ("qwen3", "float32")])
def test_correct_merges_pass(tmp_path: Path, family: str, dtype: str, kind: str) -> None:
    if kind == "bias of B" and family == "qwen3":
        kind = "lora"  # none of its layers has a bias
    base = make_base(tmp_path / "base", family)
    adapters = weighted(make_adapter(base, tmp_path / "adapter", **options_of(kind, family)))
    result = assert_passes(base, adapters, merge(base, adapters, tmp_path / "merged", dtype))
    assert str(result.dtype) == f"torch.{dtype}" and result.behaviour is not None
    assert result.behaviour.merged_loss == pytest.approx(result.behaviour.adapter_loss, abs=0.05)


@pytest.mark.parametrize(
    "kind", ["lora", "trained tokens", "trained tokens of both", "dora on embedding and head", "a norm in full"]
)
@pytest.mark.parametrize("family", ["qwen", "qwen2"])
def test_merges_into_tied_bases_pass(tmp_path: Path, family: str, kind: str) -> None:
    base = make_base(tmp_path / "base", family, tied=True)
    adapters = weighted(make_adapter(base, tmp_path / "adapter", **options_of(kind, family)))
    assert_passes(base, adapters, merge(base, adapters, tmp_path / "merged", "bfloat16"))


def test_weighted_adapters_pass_with_their_own_weights_only(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen2")
    first = make_adapter(base, tmp_path / "a", **options_of("dora on embedding and head", "qwen2"))
    second = make_adapter(base, tmp_path / "b", seed=2, bias="all", modules_to_save=["embed_tokens"])
    adapters = [replace(each, weight=weight) for each, weight in zip(weighted(first, second), (0.7, -0.4), strict=True)]
    merged = merge(base, adapters, tmp_path / "merged", "bfloat16")
    assert_passes(base, adapters, merged)
    assert verify(base, [adapters[0], replace(adapters[1], weight=-0.3)], merged).faults


@pytest.mark.parametrize("family", ["qwen", "qwen2", "qwen3"])
def test_folder_merged_by_peft_passes(tmp_path: Path, family: str) -> None:
    base = make_base(tmp_path / "base", family)
    adapter = make_adapter(base, tmp_path / "adapter", use_dora=True, modules_to_save=["lm_head"])
    shutil.copytree(base, tmp_path / "merged")
    load_peft_model(base, adapter).merge_and_unload().save_pretrained(tmp_path / "merged")
    assert_passes(base, weighted(adapter), tmp_path / "merged")
