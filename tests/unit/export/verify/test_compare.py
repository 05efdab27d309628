"""A merged folder against base + adapters: correct merges pass, wrong tensors and configs are reported."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from checkpoints.files import load_json
from checkpoints.shards import open_checkpoint
from errors import ConfigError
from export.verify.compare import Verification, check_verifiable, describe, verify_merge
from export.verify.prompts import prompt_ids
from qwen_model.register import register_qwen
from tests.models import TINY, change_json
from tests.quantized import write_awq, write_gptq, write_wide
from tests.verification import (
    DTYPES,
    assert_passes,
    assert_reports,
    change,
    load_peft_model,
    make_adapter,
    make_base,
    merge,
    verify,
    weighted,
    zero,
)


def test_unsupported_families_are_refused() -> None:
    check_verifiable("qwen3")
    with pytest.raises(ConfigError, match=r"of type 'llama' cannot be verified, only qwen, qwen2, qwen3"):
        check_verifiable("llama")


@pytest.mark.parametrize("method", ["gptq", "gptq act-order", "awq", "nf4"])
def test_merges_into_quantised_bases_pass(tmp_path: Path, method: str) -> None:
    plain = write_wide(tmp_path / "plain")
    if method == "nf4":
        register_qwen()
        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        AutoModelForCausalLM.from_pretrained(plain, quantization_config=settings).save_pretrained(tmp_path / "base")
    elif method == "awq":
        write_awq(plain, tmp_path / "base")
    else:
        write_gptq(plain, tmp_path / "base", desc_act=method != "gptq")
    adapters = weighted(make_adapter(plain, tmp_path / "adapter"))
    assert_passes(tmp_path / "base", adapters, merge(tmp_path / "base", adapters, tmp_path / "merged", "bfloat16"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_into_another_layout_passes(tmp_path: Path, dtype: str) -> None:
    base = make_base(tmp_path / "base", "qwen")
    adapters = weighted(make_adapter(base, tmp_path / "adapter", use_dora=True))
    merged = merge(base, adapters, tmp_path / "merged", dtype, layout="qwen2")
    assert load_json(merged / "config.json")["model_type"] == "qwen2"
    assert_passes(base, adapters, merged)
    zero(merged, "model.layers.1.self_attn.k_proj.weight")
    assert_reports(verify(base, adapters, merged), "model.layers.1")


@pytest.mark.parametrize("family", ["qwen", "qwen2", "qwen3"])
def test_figures_equal_those_of_whole_models(tmp_path: Path, family: str) -> None:
    """The whole models are peft's for base and adapter, and transformers' for the merged folder."""
    base = make_base(tmp_path / "base", family)
    adapter = make_adapter(base, tmp_path / "adapter", bias="all")
    merged = merge(base, weighted(adapter), tmp_path / "merged", "bfloat16")
    result = verify(base, weighted(adapter), merged)
    models = (load_peft_model(base, adapter), AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval())
    ids = prompt_ids(merged, 768)
    with torch.no_grad():
        logits = [torch.cat([model(torch.tensor([each])).logits[0] for each in ids]) for model in models]
    assert result.tokens == len(logits[0]) == sum(len(each) for each in ids)
    assert result.largest_difference == pytest.approx((logits[0] - logits[1]).abs().max().item(), rel=1e-3)
    equal = (logits[0].argmax(-1) == logits[1].argmax(-1)).float().mean().item()
    assert result.equal_tokens == pytest.approx(equal) and equal > 0.5


def test_adapter_of_the_original_script_passes(tmp_path: Path) -> None:
    adapters = weighted(TINY.parent / "training" / "lora_chat_adapter")
    merged = merge(TINY, adapters, tmp_path / "merged")
    assert_passes(TINY, adapters, merged)
    zero(merged, "transformer.h.0.attn.c_attn.weight")
    assert_reports(verify(TINY, adapters, merged), "transformer.h.0")


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_rows_outside_the_prompts_are_compared(tmp_path: Path, tied: bool) -> None:
    base = make_base(tmp_path / "base", "qwen2", tied)
    adapters = weighted(make_adapter(base, tmp_path / "adapter"))
    merged = merge(base, adapters, tmp_path / "merged", "bfloat16")
    used = {id_ for prompt in prompt_ids(merged, 768) for id_ in prompt}
    token = max(set(range(768)) - used)

    def edit(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["model.embed_tokens.weight"][token] *= 1.02
        return tensors

    change(merged, edit)
    result = verify(base, adapters, merged)
    assert result.faults[0].startswith(f"model.embed_tokens: row {token} is off by ")
    assert [fault.split(":")[0] for fault in result.faults[1:]] == (["lm_head"] if tied else [])


def test_changed_config_is_reported(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen")
    adapters = weighted(make_adapter(base, tmp_path / "adapter"))
    merged = merge(base, adapters, tmp_path / "merged", "bfloat16")
    change_json(merged / "config.json", rotary_emb_base=20000)
    assert any(fault.startswith("transformer.h.0: ") for fault in verify(base, adapters, merged).faults)
    change_json(merged / "config.json", rotary_emb_base=10000, num_hidden_layers=1)
    result = verify(base, adapters, merged)
    assert result.largest_difference == math.inf and "number of layers are (960, 32, 1)" in result.faults[0]


def test_prompts_are_cut_to_the_trained_length(tmp_path: Path) -> None:
    """Beyond the trained length Qwen v1 changes its rotary base, unlike other layouts."""
    base = make_base(tmp_path / "base", "qwen")
    change_json(base / "config.json", seq_length=20)
    adapters = weighted(make_adapter(base, tmp_path / "adapter"))
    merged = merge(base, adapters, tmp_path / "merged", layout="qwen2")
    assert assert_passes(base, adapters, merged).tokens == 12 * 20


def test_description_contains_measured_and_explained_figures() -> None:
    result = Verification(0.02134, 0.01877, 1.0, 0.998, 412, 12, torch.bfloat16)
    assert describe(result) == (
        "verified: 12 prompts, 412 tokens: largest logit difference 0.021 (rounding to bfloat16 explains 0.019); "
        "same next token at 100.0 % (99.8 %)"
    )
    lines = describe(replace(result, faults=[f"part {number}" for number in range(8)])).splitlines()
    assert lines[0].startswith("DIFFERS") and lines[1:] == [
        *(f"  part {number}" for number in range(5)),
        "  and 3 more",
    ]


def test_progress_counts_every_stage(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen2")
    steps: list[tuple[int, int]] = []
    merged = merge(base, [], tmp_path / "merged")
    config = load_json(base / "config.json")
    verify_merge(open_checkpoint(base), config, [], merged, [[1, 2, 3]], lambda *step: steps.append(step))
    assert steps == [(number, 5) for number in range(1, 6)]
