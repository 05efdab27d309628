"""``--match_quantised_base``: the merged weights are what bitsandbytes rounded them to in training, plus the change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from checkpoints.model_config import Quantization
from loading.adapters import load_adapter
from loading.checkpoint import load_checkpoint, load_model
from tests.merging import merge, merge_well, message_of, names, read
from tests.models import write_later_checkpoint
from tests.quantized import write_gptq, write_wide
from tests.verification import make_adapter

pytest.importorskip("bitsandbytes")

SETTINGS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module", params=["qwen", "qwen2"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with rows of whole blocks (v1), and one in bfloat16 whose rows of 32 are half a block of 64 (Qwen2)."""
    folder = tmp_path_factory.mktemp("base") / "base"
    if request.param == "qwen":
        return write_wide(folder)
    return write_later_checkpoint(folder, "qwen2", dtype=torch.bfloat16)


def trained_on(base: Path, folder: Path, method: str) -> Path:
    """Write an adapter as a run of ``--q_lora`` on an unquantised checkpoint would."""
    adapter = make_adapter(base, folder)
    settings = {"quant_method": "bitsandbytes"} | SETTINGS[method]
    (adapter / "base_quantization.json").write_text(json.dumps(settings))
    return adapter


def weights_in_training(model: Any) -> dict[str, torch.Tensor]:
    """Return weight + change of every layer with an adapter, as a loaded quantised model has them."""
    found = {}
    for name, module in model.named_modules():
        if not hasattr(module, "base_layer"):
            continue
        layer = module.base_layer
        if hasattr(layer, "dequantize"):
            weight = layer.dequantize(torch.float32)
        else:
            weight = layer.weight.CB.float() * layer.weight.SCB[:, None] / 127
        found[f"{name.removeprefix('base_model.model.')}.weight"] = weight + module.get_delta_weight("default")
    return found


@pytest.mark.parametrize("method", SETTINGS)
@torch.no_grad()
def test_result_is_what_was_trained(base: Path, tmp_path: Path, method: str) -> None:
    adapter, merged = trained_on(base, tmp_path / "adapter", method), tmp_path / "merged"
    flags = ("--match_quantised_base", "--dtype", "fp32")
    result = merge_well("--adapter", adapter, "--base", base, "--output", merged, *flags)
    quantization = Quantization(method, 8 if method == "int8" else 4)  # type: ignore[arg-type]
    model = load_model(load_checkpoint(str(base)), torch.float32, quantize=quantization)
    trained = load_adapter(model, str(adapter), "--adapter").eval()

    expected, written = weights_in_training(trained), load_file(merged / "model.safetensors")
    assert expected.keys() == {name for name in written if name.replace(".weight", "") in set(layers_of(trained))}
    for name, weight in expected.items():
        torch.testing.assert_close(written[name], weight, rtol=0, atol=1e-6, msg=name)

    ids = torch.randint(0, 600, (2, 40), generator=torch.Generator().manual_seed(0))
    plain = load_model(load_checkpoint(str(merged)), torch.float32).eval()
    logits, own = trained(ids).logits, plain(ids).logits
    if method == "int8":  # its layers also round what they multiply with
        assert (own - logits).square().mean().sqrt() < 0.05 * logits.std()
    else:
        torch.testing.assert_close(own, logits, rtol=0, atol=1e-4)

    title = str(quantization)
    assert read(merged)["base_rounded_as"] == title
    assert f"the base rounded as by {title} in training" in result.stdout
    card = (merged / "README.md").read_text()
    assert f"rounded as by {title}" in card and "not what was trained" not in card
    assert "answers differently" not in result.stderr


def layers_of(model: Any) -> list[str]:
    return [
        name.removeprefix("base_model.model.") for name, module in model.named_modules() if hasattr(module, "lora_A")
    ]


def test_without_the_flag_the_warning_names_it(base: Path, tmp_path: Path) -> None:
    adapter = trained_on(base, tmp_path / "adapter", "nf4")
    result = merge_well("--adapter", adapter, "--base", base, "--output", tmp_path / "merged")
    [warning] = [line for line in result.stderr.splitlines() if "trained beside weights quantised as NF4" in line]
    assert warning.endswith("--match_quantised_base merges into the weights of the training")
    assert "base_rounded_as" not in read(tmp_path / "merged")


def test_what_cannot_be_matched_is_refused(tmp_path: Path) -> None:
    base = write_wide(tmp_path / "base")
    write_gptq(base, tmp_path / "int4")
    plain = make_adapter(base, tmp_path / "plain")
    nf4, fp4 = (trained_on(base, tmp_path / name, name) for name in ("nf4", "fp4"))
    before = names(tmp_path)

    def refused(base: Path, *adapters: Path) -> str:
        flags = ("--base", base, "--any_base", "--output", tmp_path / "merged", "--match_quantised_base")
        return message_of(merge("--adapter", *adapters, *flags))

    assert f"{plain} was not trained on a base that was quantised while loading" in refused(base, plain)
    assert "the adapters were trained beside different weights" in refused(base, nf4, fp4)
    assert "the base is stored as GPTQ, 4 bits, groups of 32" in refused(tmp_path / "int4", nf4)
    assert names(tmp_path) == before
