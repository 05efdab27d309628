"""The share of a learnt change that a merge reports is that of the written weights, whatever was merged into what."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints.adapter import read_adapter
from checkpoints.fold import WeightedAdapter
from checkpoints.kept import Kept
from checkpoints.model_config import Rounding
from checkpoints.writing import save_source
from errors import ConfigError
from export.inputs import open_base
from export.merging import MergePlan, plan_merge
from tests.adapters import EMBEDDING, HEAD, LINEAR, make_adapter, make_base, rewrite

BF16 = torch.bfloat16


def small(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Make the change so small that most weights do not move when rounded to nearest."""
    return {name: tensor * (0.002 if "lora_B" in name else 1.0) for name, tensor in tensors.items()}


def merged(
    base: Path, output: Path, *adapters: Path, dtype: str = "auto", rounding: Rounding = "dithered", weight: float = 1.0
) -> tuple[MergePlan, dict[str, Tensor]]:
    """Write a merge; return its plan, which then knows what was kept, and the written tensors."""
    weighted = [WeightedAdapter(read_adapter(folder), weight) for folder in adapters]
    plan = plan_merge(open_base(base), weighted, "auto", dtype, rounding)
    save_source(plan.source, output, 10**9)
    return plan, load_file(output / "model.safetensors")


def share_of(written: dict[str, Tensor], exact: dict[str, Tensor], base: dict[str, Tensor]) -> float:
    applied = learnt = 0.0
    for name, value in exact.items():
        before = base[EMBEDDING if name not in base else name].float()
        change = value - before
        applied += float(((written[name].float() - before) * change).sum())
        learnt += float(change.square().sum())
    return applied / learnt


CASES: dict[str, tuple[torch.dtype, bool, str, dict[str, Any]]] = {
    "plain": (BF16, False, "auto", {}),
    "dora": (BF16, False, "auto", {"use_dora": True}),
    "biases": (BF16, False, "auto", {"bias": "all"}),
    "float32 base": (torch.float32, False, "bf16", {}),
    "float16": (torch.float16, False, "auto", {}),
    "untied embedding": (BF16, True, "auto", {"target_modules": ["q_proj", "embed_tokens"]}),
    "trained head": (BF16, False, "auto", {"modules_to_save": ["lm_head"]}),
}


@pytest.mark.parametrize("rounding", ["dithered", "nearest"])
@pytest.mark.parametrize("case", CASES)
def test_reported_share_is_that_of_the_written_weights(tmp_path: Path, case: str, rounding: Rounding) -> None:
    base_dtype, tied, dtype, options = CASES[case]
    base = make_base(tmp_path / "base", tied=tied, dtype=base_dtype)
    adapter = make_adapter(base, tmp_path / "adapter", **{"target_modules": LINEAR} | options)
    rewrite(adapter, small)
    _, exact = merged(base, tmp_path / "exact", adapter, dtype="fp32")
    plan, written = merged(base, tmp_path / "written", adapter, dtype=dtype, rounding=rounding)
    kept = plan.source.kept.total()
    assert kept.share == pytest.approx(share_of(written, exact, load_file(base / "model.safetensors")), abs=1e-3)
    changed = {name for name in written if "lora" not in name and name in plan.source.kept.by_tensor}
    assert changed and (HEAD in changed) == ("modules_to_save" in options)


def test_unchanged_tensors_are_rounded_to_nearest(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    plan, written = merged(base, tmp_path / "out", adapter, dtype="bf16")
    stored = load_file(base / "model.safetensors")
    for name, tensor in stored.items():
        assert torch.equal(written[name], tensor.bfloat16()) == ("q_proj.weight" not in name)
    assert set(plan.source.kept.by_kind()) == {"self_attn.q_proj"}


@pytest.mark.parametrize(("base_dtype", "dtype"), [(torch.float32, "bf16"), (torch.float32, "fp16"), (BF16, "fp16")])
def test_unchanged_rows_of_a_changed_tensor_are_rounded_to_nearest(
    tmp_path: Path, base_dtype: torch.dtype, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the rows at a time: an embedding of which two rows were trained, one of them in the second block."""
    base = make_base(tmp_path / "base", dtype=base_dtype)
    stored = load_file(base / "model.safetensors")
    stored[EMBEDDING][:, ::3] *= 1e-4  # some values below the smallest normal number of float16
    save_file(stored, base / "model.safetensors", {"format": "pt"})
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], trainable_token_indices=[3, 30])
    others = [row for row in range(40) if row not in (3, 30)]
    embeddings = []
    for block in (2**20, 20 * 16, 48):
        monkeypatch.setattr("checkpoints.source.BLOCK_ELEMENTS", block)
        _, written = merged(base, tmp_path / f"out{block}", adapter, dtype=dtype)
        embedding, expected = written[EMBEDDING], stored[EMBEDDING].to(written[EMBEDDING].dtype)
        assert torch.equal(embedding[others], expected[others])
        assert not torch.equal(embedding[[3, 30]], expected[[3, 30]])
        embeddings.append(embedding)
    assert all(torch.equal(each, embeddings[0]) for each in embeddings)


def test_a_zero_change_loses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = make_base(tmp_path / "base", dtype=BF16)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=LINEAR)
    plan, written = merged(base, tmp_path / "out", adapter, weight=0.0)
    plan.warn_of_loss()
    assert [message[:17] for message in caplog.messages] == ["No weight changed"]
    assert plan.source.kept.describe() == "" and plan.report()["change"]["kept"] == 1
    for name, tensor in load_file(base / "model.safetensors").items():
        assert torch.equal(written[name], tensor)


def test_float32_keeps_the_whole_change(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype=BF16)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=LINEAR)
    plan, _ = merged(base, tmp_path / "out", adapter, dtype="fp32")
    assert plan.report()["change"] == {"kept": 1.0, "moved": 0.0, "by_kind": {}}


def test_same_bits_for_any_block_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path / "base", dtype=BF16)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=LINEAR, bias="all")
    _, expected = merged(base, tmp_path / "whole", adapter)
    monkeypatch.setattr("checkpoints.source.BLOCK_ELEMENTS", 48)
    plan, written = merged(base, tmp_path / "blocks", adapter)
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    monkeypatch.setattr("export.kept_change._MEASURED", 32)  # of larger tensors some rows
    sampled, _ = merged(base, tmp_path / "sampled", adapter)
    assert sampled.source.kept.by_tensor.keys() == plan.source.kept.by_tensor.keys()
    assert sampled.source.kept.total().share == pytest.approx(plan.source.kept.total().share, abs=0.2)


def test_words_name_the_worst_layer_and_the_remedy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = make_base(tmp_path / "base", dtype=BF16)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    rewrite(adapter, lambda tensors: {name: each * (1e-3 if "down" in name else 1) for name, each in tensors.items()})
    plan, _ = merged(base, tmp_path / "nearest", adapter, rounding="nearest")
    name, worst = plan.source.kept.worst()
    assert "mlp.down_proj" in name and worst.share < 0.9
    assert f"(worst: {name.removeprefix('model.').removesuffix('.weight')} {worst.share:.1%}".replace("%", " %") in (
        plan.summary()
    )
    assert "self_attn.q_proj 100.0 %" in plan.source.kept.describe_kinds()
    rewrite(adapter, small)
    plan, _ = merged(base, tmp_path / "lost", adapter, rounding="nearest")
    with caplog.at_level(logging.WARNING):
        plan.warn_of_loss()
    assert "--rounding dithered or --dtype fp32" in caplog.text
    assert "of the change that the adapter learnt" in caplog.text


@pytest.mark.parametrize(("share", "text"), [(0.94, "holds only 94.0 %"), (1.06, "holds 106.0 %"), (1.04, "")])
def test_a_share_far_from_the_whole_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, share: float, text: str
) -> None:
    base = make_base(tmp_path / "base", dtype=BF16)
    plan, _ = merged(base, tmp_path / "out", make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"]))
    plan.source.kept.by_tensor.clear()
    plan.source.kept.by_tensor["x"] = Kept(1.0, share, 1, 1)
    plan.warn_of_loss()
    assert text in caplog.text and bool(caplog.records) == bool(text)


def test_overflow_names_tensor_and_remedy(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    rewrite(adapter, lambda tensors: {name: tensor * 1000 for name, tensor in tensors.items()})
    with pytest.raises(ConfigError, match=r"q_proj.weight is not finite in float16\. Try --dtype bf16"):
        merged(base, tmp_path / "out", adapter, dtype="fp16")
    file = base / "model.safetensors"
    save_file({name: tensor * float("nan") for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(ConfigError, match="holds NaN or infinity"):
        merged(base, tmp_path / "nan", adapter, dtype="bf16")
