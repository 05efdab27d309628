"""A merged folder against base + adapters: correct merges pass, wrong tensors and configs are reported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from checkpoints.files import load_json
from checkpoints.shards import open_checkpoint
from errors import ConfigError
from export.verify.behaviour import Behaviour, Comparison
from export.verify.compare import Verification, check_verifiable, describe, verify_merge
from export.verify.samples import Sample, Samples, choose_samples
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
    assert_reports(verify(base, adapters, merged), "transformer.h.1.attn.c_attn.weight")


@pytest.mark.parametrize("family", ["qwen", "qwen2", "qwen3"])
def test_figures_equal_those_of_whole_models(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole models are peft's for base and adapter, and transformers' for the base and the merged folder."""
    monkeypatch.setattr("export.verify.behaviour.computes_bfloat16", lambda: False)
    base = make_base(tmp_path / "base", family)
    adapters = weighted(make_adapter(base, tmp_path / "adapter", bias="all"))
    merged = merge(base, adapters, tmp_path / "merged", "bfloat16")
    behaviour = verify(base, adapters, merged).behaviour
    assert behaviour is not None
    samples = choose_samples(adapters, merged, 768)
    models = [load_peft_model(base, tmp_path / "adapter")]
    models += [AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32).eval() for each in (base, merged)]
    losses, best = [], []
    for model in models:
        with torch.no_grad():
            logits = torch.cat([model(torch.tensor([each.ids])).logits[0, :-1] for each in samples.items])
        targets = torch.tensor([id_ for each in samples.items for id_ in each.ids[1:]])
        losses.append(torch.nn.functional.cross_entropy(logits, targets).item())
        best.append(logits.argmax(-1))
    assert behaviour.tokens == len(best[0]) > 40
    assert [behaviour.adapter_loss, behaviour.base_loss, behaviour.merged_loss] == pytest.approx(losses, rel=1e-4)
    equal = [(best[0] == each).float().mean().item() for each in best[1:]]
    assert [behaviour.base_equal, behaviour.merged_equal] == pytest.approx(equal) and equal[1] > 0.5


def test_adapter_of_the_original_script_passes(tmp_path: Path) -> None:
    adapters = weighted(TINY.parent / "training" / "lora_chat_adapter")
    merged = merge(TINY, adapters, tmp_path / "merged")
    assert_passes(TINY, adapters, merged)
    zero(merged, "transformer.h.0.attn.c_attn.weight")
    assert_reports(verify(TINY, adapters, merged), "transformer.h.0.attn.c_attn.weight")


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_rows_outside_the_prompts_are_compared(tmp_path: Path, tied: bool) -> None:
    base = make_base(tmp_path / "base", "qwen2", tied)
    adapters = weighted(make_adapter(base, tmp_path / "adapter"))
    merged = merge(base, adapters, tmp_path / "merged", "bfloat16")
    used = {id_ for sample in choose_samples(adapters, merged, 768).items for id_ in sample.ids}
    token = max(set(range(768)) - used)

    def edit(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["model.embed_tokens.weight"][token] *= 1.02
        return tensors

    change(merged, edit)
    faults = verify(base, adapters, merged).faults
    assert faults == [f"model.embed_tokens.weight: row {token} differs from the base's, and no adapter changes it"]


def test_changed_config_is_reported(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen")
    adapters = weighted(make_adapter(base, tmp_path / "adapter"))
    merged = merge(base, adapters, tmp_path / "merged", "bfloat16")
    change_json(merged / "config.json", rotary_emb_base=20000)
    faults = verify(base, adapters, merged).faults
    assert [fault.split(" gives")[0] for fault in faults] == [f"transformer.h.{i}: config.json" for i in range(2)]
    change_json(merged / "config.json", rotary_emb_base=10000, num_hidden_layers=1)
    result = verify(base, adapters, merged)
    assert result.behaviour is None and "number of layers are (960, 32, 1)" in result.faults[0]


def test_prompts_are_cut_to_the_trained_length(tmp_path: Path) -> None:
    """Beyond the trained length Qwen v1 changes its rotary base, unlike other layouts."""
    base = make_base(tmp_path / "base", "qwen")
    change_json(base / "config.json", seq_length=20)
    adapters = weighted(make_adapter(base, tmp_path / "adapter"))
    merged = merge(base, adapters, tmp_path / "merged", layout="qwen2")
    behaviour = assert_passes(base, adapters, merged).behaviour
    assert behaviour is not None and {len(sample.ids) for sample in behaviour.samples.items} == {20}


def test_description_contains_the_figures() -> None:
    samples = Samples(4 * (Sample([1, 2], [-100, 2]),), are_trained=True)
    behaviour = Behaviour(2.4722, 2.1081, 2.1099, 0.71, 0.991, 0.001, 96, samples)
    result = Verification(290, 0.9998, torch.bfloat16, "dithered", behaviour)
    assert describe(result) == (
        "verified: 290 tensors are base + adapter, rounded to bfloat16\n"
        "  the adapter's answers on 4 training samples: loss 2.108, merged 2.110; same next token at 99.1% of "
        "96 tokens (without the adapter: 2.472, 71.0%)"
    )
    lines = describe(replace(result, faults=[f"part {number}" for number in range(8)])).splitlines()
    assert lines[0].startswith("DIFFERS") and lines[1:] == [
        *(f"  part {number}" for number in range(5)),
        "  and 3 more",
    ]


@pytest.mark.parametrize(
    ("merged_loss", "error", "warns"), [(2.343, 0.02, True), (2.15, 0.02, False), (2.3, 0.1, False)]
)
def test_lost_answers_are_a_warning_with_the_remedy(merged_loss: float, error: float, warns: bool) -> None:
    """More than a quarter of what was learnt, beyond the error of the mean."""
    samples = Samples((Sample([1, 2], [-100, 2]),), are_trained=True)
    behaviour = Behaviour(2.472, 2.108, merged_loss, 0.71, 0.83, error, 96, samples)
    result = Verification(290, 0.497, torch.bfloat16, "nearest", behaviour)
    assert (result.warning == "") == (not warns)
    if warns:
        assert result.warning.startswith("the merged model gives back 35% of what the adapter learnt")
        assert "bfloat16 holds 50% of the adapter's change" in result.warning and "--dtype fp32" in result.warning
        assert "--rounding" in result.warning and "--rounding" not in replace(result, rounding="dithered").warning
    everyday = replace(behaviour, samples=replace(samples, are_trained=False))
    assert replace(result, behaviour=everyday).warning == ""


def test_progress_counts_every_stage(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen2")
    steps: list[tuple[int, int]] = []
    merged = merge(base, [], tmp_path / "merged")
    config = load_json(base / "config.json")
    samples = Samples((Sample([1, 2, 3], [-100, 2, 3]),), are_trained=False)
    comparison = Comparison(open_checkpoint(base), config, [], merged, samples)
    verify_merge(comparison, "nearest", lambda *step: steps.append(step))
    assert steps == [(number, 5) for number in range(1, 6)]
