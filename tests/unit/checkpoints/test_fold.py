"""Merging adapters into their base: the result equals peft's, tied bases are untied if needed, precision is kept."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from checkpoints.names import ADAPTER_WEIGHTS
from checkpoints.shards import open_checkpoint
from checkpoints.source import InDtype
from checkpoints.writing import save_checkpoint, save_source
from errors import ConfigError
from tests.adapters import (
    EMBEDDING,
    HEAD,
    LINEAR,
    assert_same,
    fold,
    make_adapter,
    make_base,
    open_peft,
    plan,
    read_all,
    rewrite,
)
from tests.golden import Golden, assert_close

IDS = torch.tensor([[3, 5, 7, 1, 0, 39, 20, 3], [9, 8, 7, 6, 5, 4, 3, 2]])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read tiny tensors in as many blocks of rows as real ones."""
    monkeypatch.setattr("checkpoints.source.BLOCK_ELEMENTS", 48)


def assert_equals_peft(base: Path, adapter: Path, merged: dict[str, Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = open_peft(base, adapter).merge_and_unload().state_dict()
    if HEAD not in merged:
        assert torch.equal(expected.pop(HEAD), expected[EMBEDDING]), "peft must keep them tied"
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_close(merged[name], tensor, 1e-6, name)


def logits_of(tensors: dict[str, Tensor], base: Path) -> Tensor:
    """Logits of a plain model with these tensors, its head tied if they contain none."""
    config = Qwen2Config.from_pretrained(base, tie_word_embeddings=HEAD not in tensors)
    model = Qwen2ForCausalLM(config)
    result = model.load_state_dict(tensors, strict=False)
    assert not result.unexpected_keys and result.missing_keys in ([], [HEAD])
    model.tie_weights()
    with torch.no_grad():
        return model.eval()(IDS).logits


def peft_logits(base: Path, adapter: Path) -> Tensor:
    with torch.no_grad():
        return open_peft(base, adapter)(IDS).logits


# ------------------------------------------------------------------------------------------------------ equal to peft

# A pattern matches the end of a module's name; the first match counts; no leading dot is needed.
PATTERNS = {
    "rank_pattern": {"q_proj": 2, "layers.0.self_attn.v_proj": 6, "v_proj": 3, "^model.layers.1.mlp.down_proj": 5},
    "alpha_pattern": {"layers.*.q_proj": 5, "_proj": 7, "gate_proj": 30, "self_attn.o_proj": 31},
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one module by a regular expression": {"target_modules": r".*\.1\..*(up|down)_proj"},
    "patterns": PATTERNS,
    "rslora": {"use_rslora": True},
    "rslora with patterns": {"use_rslora": True, **PATTERNS},
    "all biases": {"bias": "all"},
    "biases of LoRA's modules": {"bias": "lora_only"},
    "bias of B": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "bias of B and all biases": {"lora_bias": True, "bias": "all", "target_modules": ["q_proj", "v_proj"]},
    "dora": {"use_dora": True},
    "dora on the embedding": {"use_dora": True, "target_modules": ["q_proj", "embed_tokens"], **PATTERNS},
    "embedding and head in full": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "a whole module": {"modules_to_save": ["mlp", "norm"], "target_modules": ["q_proj"]},
    "trained tokens": {"trainable_token_indices": [7, 3, 39]},
    "trained tokens of both": {"trainable_token_indices": {"embed_tokens": [7, 3], "lm_head": [7, 3]}},
    "other trained tokens of both": {"trainable_token_indices": {"embed_tokens": [7, 3], "lm_head": [0, 1, 2]}},
    "trained tokens of the head": {"trainable_token_indices": {"lm_head": [5]}},
    "LoRA on the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "LoRA on embedding and head": {"target_modules": ["q_proj", "embed_tokens", "lm_head"], **PATTERNS},
    "gaussian start": {"init_lora_weights": "gaussian"},
    "orthogonal start": {"init_lora_weights": "orthogonal"},
    "some layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
}
if "mica" in str(LoraConfig.__dataclass_fields__["init_lora_weights"].type):  # which peft knows from 0.20
    CASES["mica start"] = {"init_lora_weights": "mica"}
TIED_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "embedding in full, tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "embedding in full": {"modules_to_save": ["embed_tokens"]},
    "head in full": {"modules_to_save": ["lm_head"]},
    "embedding and head in full": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "trained tokens": {"trainable_token_indices": [7, 3]},
    "trained tokens of both": {"trainable_token_indices": {"embed_tokens": [7, 3], "lm_head": [7, 3]}},
    "all biases": {"bias": "all"},
}
# Cases in which peft merges different changes of the two modules, or one change twice, into the shared tensor.
DIFFERING_CASES: dict[str, tuple[bool, dict[str, Any]]] = {
    "LoRA on the embedding": (True, {"target_modules": ["q_proj", "embed_tokens"]}),
    "LoRA on the head": (True, {"target_modules": ["q_proj", "lm_head"]}),
    "LoRA on embedding and head": (True, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "one LoRA for both": (False, {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}),
    "trained tokens of the head": (True, {"trainable_token_indices": {"lm_head": [5]}}),
    "other trained tokens": (True, {"trainable_token_indices": {"embed_tokens": [7, 3], "lm_head": [5]}}),
}


@pytest.mark.parametrize("case", CASES)
def test_merge_equals_peft(tmp_path: Path, case: str) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", **{"target_modules": LINEAR} | CASES[case])
    merged = fold(base, adapter)
    assert_equals_peft(base, adapter, merged)
    unchanged = load_file(base / "model.safetensors")
    changed = [name for name in merged if not torch.equal(merged[name], unchanged[name])]
    planned = plan(base, adapter)
    assert sorted(changed) == sorted(planned.changed), "Fold.changed lists the tensors that differ"
    assert not planned.moved
    for name in planned.names():
        planned.read(name)
    assert sorted(changed) == sorted(planned.moved), "Fold.moved lists those that have been found to differ"


@pytest.mark.parametrize("case", TIED_CASES)
def test_merge_into_a_tied_base_equals_peft(tmp_path: Path, case: str) -> None:
    base = make_base(tmp_path / "base", tied=True)
    assert HEAD not in load_file(base / "model.safetensors")
    adapter = make_adapter(base, tmp_path / "adapter", **{"target_modules": LINEAR} | TIED_CASES[case])
    merged = fold(base, adapter)
    assert_equals_peft(base, adapter, merged)
    assert plan(base, adapter).untied == (HEAD in merged)
    # fp32 sums in another order differ by 2e-6 at logits of 20.
    assert_close(logits_of(merged, base), peft_logits(base, adapter), 2e-5, "logits of the adapter")


@pytest.mark.parametrize("case", DIFFERING_CASES)
def test_merge_into_a_tied_base_equals_base_with_adapter(tmp_path: Path, case: str) -> None:
    untied, options = DIFFERING_CASES[case]
    base = make_base(tmp_path / "base", tied=True)
    adapter = make_adapter(base, tmp_path / "adapter", **{"target_modules": LINEAR} | options)
    merged = fold(base, adapter)
    assert plan(base, adapter).untied == untied == (HEAD in merged)
    assert_close(logits_of(merged, base), peft_logits(base, adapter), 2e-5, "logits of the adapter")


def test_equal_tensors_with_different_effect_untie(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=True)
    both = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    adapter = make_adapter(base, tmp_path / "lora", **both)
    assert not plan(base, adapter).untied
    rewrite(adapter, alpha_pattern={"lm_head": 1})
    assert plan(base, adapter).untied

    tokens = {"embed_tokens": [7, 3], "lm_head": [5, 3]}
    adapter = make_adapter(base, tmp_path / "rows", target_modules=LINEAR, trainable_token_indices=tokens)
    rewrite(adapter, lambda tensors: {name: tensor * ("delta" not in name) for name, tensor in tensors.items()})
    assert plan(base, adapter).untied


def test_stored_head_of_a_tied_base_is_dropped(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=True)
    tensors = load_file(base / "model.safetensors")
    save_file({**tensors, HEAD: torch.zeros(40, 16)}, base / "model.safetensors", {"format": "pt"})
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=LINEAR)
    assert fold(base, adapter).keys() == tensors.keys()


def test_sharded_base_gives_the_same_tensors(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=LINEAR)
    expected = fold(base, adapter)
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    assert len(save_checkpoint(tensors.items(), base, max_shard_size=4000)) > 3
    assert_same(fold(base, adapter), expected)


# ----------------------------------------------------------------------------------------------------- several adapters

BLENDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "of the same modules": ({}, {"r": 3, "lora_alpha": 5}),
    "of other modules": ({"target_modules": ["q_proj"]}, {"target_modules": ["v_proj", "lm_head"], "bias": "all"}),
    "of other kinds": ({"use_dora": True}, {"use_rslora": True, "modules_to_save": ["embed_tokens", "mlp"]}),
    "with embeddings": (
        {"trainable_token_indices": [7, 3]}, {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("blend", BLENDS)
def test_weighted_adapters_add_their_changes(tmp_path: Path, blend: str) -> None:
    base = make_base(tmp_path / "base")
    adapters = [
        make_adapter(base, tmp_path / f"adapter{number}", **{"target_modules": LINEAR} | options)
        for number, options in enumerate(BLENDS[blend])
    ]
    alone = [open_peft(base, adapter).merge_and_unload().state_dict() for adapter in adapters]
    plain = load_file(base / "model.safetensors")
    merged = fold(base, (adapters[0], 0.7), (adapters[1], -0.3))
    assert merged.keys() == plain.keys()
    for name, tensor in plain.items():
        expected = tensor + 0.7 * (alone[0][name] - tensor) - 0.3 * (alone[1][name] - tensor)
        assert_close(merged[name], expected, 1e-6, name)
    assert_same(fold(base, (adapters[0], 1.0)), fold(base, adapters[0]))


def test_weight_zero_gives_the_base(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=LINEAR, modules_to_save=["lm_head"])
    assert_same(fold(base, (adapter, 0.0)), load_file(base / "model.safetensors"))


def test_tied_embedding_rows_apply_to_untied_head(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=True)
    tokens = make_adapter(base, tmp_path / "tokens", target_modules=LINEAR, trainable_token_indices=[7])
    head = make_adapter(base, tmp_path / "head", target_modules=["lm_head"])
    merged, alone = fold(base, tokens, head), fold(base, head)
    change = fold(base, tokens)[EMBEDDING][7] - load_file(base / "model.safetensors")[EMBEDDING][7]
    assert change.any()
    assert_close(merged[HEAD][7], alone[HEAD][7] + change, 1e-6, HEAD)
    assert torch.equal(merged[HEAD][8], alone[HEAD][8])


# ----------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_tensors_are_rounded_once_from_fp32(tmp_path: Path, dtype: torch.dtype) -> None:
    base = make_base(tmp_path / "base", dtype=dtype)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=LINEAR, trainable_token_indices=[2])
    rewrite(adapter, lambda tensors: {name: tensor.float() * 1.001 for name, tensor in tensors.items()})
    exact = fold(base, adapter, dtype=torch.float32)
    assert {tensor.dtype for tensor in exact.values()} == {torch.float32}
    assert_same(fold(base, adapter), {name: tensor.to(dtype) for name, tensor in exact.items()})

    name = "model.layers.0.mlp.down_proj.weight"
    stem = "base_model.model.model.layers.0.mlp.down_proj.lora_"
    lora = load_file(adapter / "adapter_model.safetensors")
    stored = load_file(base / "model.safetensors")[name]
    delta = 3 * lora[f"{stem}B.weight"].double() @ lora[f"{stem}A.weight"].double()
    assert_close(exact[name], (stored.double() + delta).float(), 1e-6, name)
    assert not torch.equal(exact[name].to(dtype), stored + delta.to(dtype)), "rounding twice would show"


def test_integer_tensor_keeps_its_dtype(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=LINEAR)
    tensors = load_file(base / "model.safetensors") | {"model.table": torch.arange(3)}
    save_file(tensors, base / "model.safetensors")
    merged = fold(base, adapter, dtype=torch.float16)
    assert torch.equal(merged.pop("model.table"), torch.arange(3))
    assert {tensor.dtype for tensor in merged.values()} == {torch.float16}


def test_files_of_base_and_adapter_are_not_changed(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=LINEAR, modules_to_save=["lm_head"], bias="all")
    files = (base / "model.safetensors", adapter / "adapter_model.safetensors")
    before = [file.read_bytes() for file in files]
    folded = plan(base, adapter)
    assert_same(read_all(folded), read_all(folded))
    assert [file.read_bytes() for file in files] == before


def test_overflow_in_the_output_dtype_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    rewrite(adapter, lambda tensors: {name: tensor * 1000 for name, tensor in tensors.items()})
    name = "model.layers.0.self_attn.q_proj.weight"
    assert fold(base, adapter)[name].isfinite().all()
    with pytest.raises(ConfigError, match=rf"{name} is not finite in float16\. Try --dtype bf16"):
        save_source(InDtype(plan(base, adapter), torch.float16), tmp_path / "out", 10**9)
    assert [*(tmp_path / "out").iterdir()] == []


# -------------------------------------------------------------------------------------- adapters of the original script


def test_adapter_of_the_original_script_merges_to_recorded_weights(
    any_golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("checkpoints.source.BLOCK_ELEMENTS", 1 << 16)
    adapter = any_golden.path / "training" / "lora_chat_adapter"
    recorded = any_golden.tensors_of("training/lora_chat.safetensors")
    merged = fold(any_golden.tiny, adapter, dtype=torch.float32)
    compared = set()
    for name in recorded:
        if name.startswith("merged."):
            stem, _, stride = name.removeprefix("merged.").partition(".s")
            assert_close(merged[stem][:: int(stride or 1)], recorded[name], 1e-5, name)
            compared.add(stem)
    trained = {name.split(".lora_")[0] for name in open_checkpoint(adapter, ADAPTER_WEIGHTS).names()}
    changed = plan(any_golden.tiny, adapter).changed
    assert {f"base_model.model.{name.removesuffix('.weight')}" for name in changed} == trained
    assert changed and compared.issuperset(changed)
