"""An adapter of quantised weights that is merged into unquantised ones: said in log and card, with the difference."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from checkpoints.model_config import Quantization
from checkpoints.shards import fingerprint
from export.verify.samples import choose_samples
from loading.adapters import load_adapter
from loading.checkpoint import load_checkpoint, load_model
from tests.merging import Merged, merge_well
from tests.quantized import write_gptq, write_wide
from tests.verification import make_adapter

NOTE = re.compile(
    r"weights differ from the quantised form by (?P<weights>[\d.]+)%; on \d+ everyday conversations? the loss is "
    r"(?P<merged>[\d.]+) instead of (?P<trained>[\d.]+), same next token at (?P<equal>[\d.]+)%"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wide(tmp_path_factory.mktemp("wide") / "base")


def predictions(model: Any, merged: Path) -> tuple[float, torch.Tensor]:
    """Return loss and most likely next tokens for the conversations of the comparison."""
    samples = choose_samples([], merged, model.config.vocab_size).items
    with torch.no_grad():
        logits = torch.cat([model(torch.tensor([each.ids])).logits[0, :-1].float() for each in samples])
    targets = torch.tensor([id_ for each in samples for id_ in each.ids[1:]])
    return float(torch.nn.functional.cross_entropy(logits, targets)), logits.argmax(-1)


def assert_said(merged: Path, log: str, title: str, trained: Any) -> None:
    """Check that log and card contain the differences between the trained and the merged model."""
    plain = load_model(load_checkpoint(str(merged)), torch.float32)
    (expected_loss, expected), (loss, actual) = predictions(trained.eval(), merged), predictions(plain.eval(), merged)
    for text in (log, (merged / "README.md").read_text()):
        assert f"was trained beside weights quantised as {title}" in text
        match = NOTE.search(text)
        assert match, text
        assert 1 < float(match["weights"]) < 40
        assert float(match["merged"]) == pytest.approx(loss, abs=0.01)
        assert float(match["trained"]) == pytest.approx(expected_loss, abs=0.01)
        assert float(match["equal"]) == pytest.approx(100 * float((expected == actual).float().mean()), abs=2)


@pytest.mark.parametrize(
    ("quantization", "settings"),
    [
        (Quantization("nf4", 4), {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
        (Quantization("fp4", 4), {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}),
    ],
)
def test_adapter_of_weights_rounded_while_loading(
    base: Path, tmp_path: Path, quantization: Quantization, settings: dict[str, Any]
) -> None:
    pytest.importorskip("bitsandbytes")
    adapter = make_adapter(base, tmp_path / "adapter")
    (adapter / "base_quantization.json").write_text(json.dumps({"quant_method": "bitsandbytes"} | settings))
    result = merge_well("--adapter", adapter, "--base", base, "--output", tmp_path / "merged")
    assert "verified: " in result.stdout
    trained = load_model(load_checkpoint(str(base)), torch.float32, quantize=quantization)
    assert_said(tmp_path / "merged", result.stderr, str(quantization), load_adapter(trained, str(adapter), "--adapter"))


def test_adapter_of_a_quantised_checkpoint(base: Path, tmp_path: Path) -> None:
    write_gptq(base, tmp_path / "int4")
    adapter = make_adapter(base, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": str(tmp_path / "int4")})
    )
    title = "GPTQ, 4 bits, groups of 32"
    summary = {
        "base_fingerprint": fingerprint(tmp_path / "int4"), "base_is_quantized": True, "quantization": title,
    }  # fmt: skip
    (adapter / "run_summary.json").write_text(json.dumps(summary))
    arguments = ["--adapter", adapter, "--base", base, "--output"]
    result = merge_well(*arguments, tmp_path / "merged")
    trained = load_model(load_checkpoint(str(tmp_path / "int4")), torch.float32)
    assert_said(tmp_path / "merged", result.stderr, title, load_adapter(trained, str(adapter), "--adapter"))

    shutil.rmtree(tmp_path / "int4")
    result = merge_well(*arguments, tmp_path / "gone")
    assert f"quantised as {title}" in result.stderr and "(not measured: " in result.stderr
    assert "not measured" in (tmp_path / "gone" / "README.md").read_text()


def test_without_verification_nothing_is_measured(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")

    def merge(name: str) -> Merged:
        return merge_well("--adapter", adapter, "--base", base, "--output", tmp_path / name, "--no_verify")

    assert "quantised as" not in merge("plain").stderr
    assert "what was trained" not in (tmp_path / "plain" / "README.md").read_text()
    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (adapter / "base_quantization.json").write_text(json.dumps(settings))
    result = merge("int8")
    assert "quantised as 8-bit by bitsandbytes" in result.stderr and "(not measured: --no_verify)" in result.stderr
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "int8"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
