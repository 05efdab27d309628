"""Quantising a pretrained model loses much less than rounding to nearest, in both file formats."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import quantize
from tests.commands import read_json, run_here


@pytest.mark.parametrize("format_", ["gptq", "awq"])
def test_perplexity_rises_less_than_with_rounding_to_nearest(
    small_model: Path, shared: Path, tmp_path: Path, format_: str
) -> None:
    flags = ["--model_name_or_path", small_model, "--data_path", shared / "corpora" / "alpaca_en_demo.json"]
    flags += ["--output_dir", tmp_path / "out", "--format", format_, "--group_size", 64, "--samples", 32]
    assert run_here(quantize.main, "quantize", flags) == 0
    report = read_json(tmp_path / "out" / "quantization_report.json")
    assert report["held_out"]["answer_tokens"] >= 2000
    assert report["change"]["after"]["high"] < 0.6 * report["change"]["nearest"]["value"]
    # Of every layer, also of those in which the first token has nearly all the energy of the inputs.
    assert max(report["layer_errors"].values()) < 0.3
