"""Published quantised layouts: read here, compared with weights that the tests pack and with gptqmodel's layers.

gptqmodel runs in a separate process: importing it changes environment variables and classes of transformers.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints.model_config import find_quantization
from checkpoints.packed_weights import PARTS, unpack_weight
from loading.checkpoint import load_checkpoint, load_model
from tests.golden import REPO
from tests.models import TINY, write_later_checkpoint
from tests.quantized import write_awq, write_dequantized, write_gptq, write_wide

IDS = torch.randint(0, 700, (2, 24), generator=torch.Generator().manual_seed(0))


@dataclass
class Layout:
    """Writer of a checkpoint in one layout.

    Attributes:
        source: name of the unquantised checkpoint.
        tolerance: largest relative difference between gptqmodel's logits and those of the weights in float32;
            ``None`` if transformers does not read the layout.
    """

    source: str
    write: Callable[..., dict[str, Tensor]]
    tolerance: float | None


# Measured up to 9.2e-4 and 1.5e-3: gptqmodel rounds weights to float16, and with AWQ also their inputs.
GPTQ_TOLERANCE, AWQ_TOLERANCE = 1e-3, 2e-3
LAYOUTS = {
    "qwen-int4": Layout("wide", partial(write_gptq, group_size=128), GPTQ_TOLERANCE),
    "qwen-int8": Layout("wide", partial(write_gptq, bits=8, group_size=128), GPTQ_TOLERANCE),
    "qwen-act-order": Layout("qwen", partial(write_gptq, group_size=16, desc_act=True), GPTQ_TOLERANCE),
    "qwen-zero-points": Layout("qwen", partial(write_gptq, sym=False), GPTQ_TOLERANCE),
    "qwen-unnamed": Layout("qwen", partial(write_gptq, config="unnamed"), None),
    "qwen2-first-uploads": Layout(
        "qwen2", partial(write_gptq, config="quantize_config.json", file_name="gptq_model-4bit-32g"), None
    ),
    "qwen2-whole-rows": Layout("qwen2", partial(write_gptq, group_size=-1, zero_biases=False), GPTQ_TOLERANCE),
    "qwen3-v2": Layout(
        "qwen3", partial(write_gptq, sym=False, zeros="v2", config="new", zero_biases=False), GPTQ_TOLERANCE
    ),
    "qwen-awq": Layout("wide", partial(write_awq, group_size=128), AWQ_TOLERANCE),
    "qwen2-awq": Layout("qwen2", write_awq, AWQ_TOLERANCE),
    "qwen3-awq-first": Layout("qwen3", partial(write_awq, config="quant_config.json"), None),
}
READABLE = [name for name, layout in LAYOUTS.items() if layout.tolerance is not None]


@dataclass
class Written:
    folder: Path
    weights: dict[str, Tensor]
    logits: Tensor  # of the weights in float32


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Written]:
    root = tmp_path_factory.mktemp("layouts")
    sources = {"qwen": TINY, "wide": write_wide(root / "wide")}
    for model_type in ("qwen2", "qwen3"):
        sources[model_type] = write_later_checkpoint(root / model_type, model_type)
    result = {}
    for name, layout in LAYOUTS.items():
        weights = layout.write(sources[layout.source], root / name)
        plain = write_dequantized(sources[layout.source], root / f"{name}-dequantized", weights)
        result[name] = Written(root / name, weights, logits(plain))
    return result


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    model = load_model(load_checkpoint(str(folder)), torch.float32)
    return model(input_ids=IDS).logits


def difference(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def stored_parts(folder: Path, weight: str) -> dict[str, Tensor]:
    (file,) = folder.glob("*.safetensors")
    tensors, layer = load_file(file), weight.removesuffix(".weight")
    return {part: tensors[f"{layer}.{part}"] for part in PARTS if f"{layer}.{part}" in tensors}


@pytest.mark.parametrize("name", LAYOUTS)
def test_weights_and_logits_equal_the_packed_ones(written: dict[str, Written], name: str) -> None:
    layout = written[name]
    quantization = find_quantization(layout.folder)
    assert quantization is not None
    for weight, expected in layout.weights.items():
        assert torch.equal(unpack_weight(stored_parts(layout.folder, weight), quantization), expected), weight
    assert difference(logits(layout.folder), layout.logits) < 1e-5


@pytest.fixture(scope="module")
def gptqmodel_results(written: dict[str, Written], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file for each layout that transformers reads: logits and weights of gptqmodel's layers."""
    output = tmp_path_factory.mktemp("gptqmodel")
    save_file({"ids": IDS}, output / "ids.safetensors")
    folders = [str(written[name].folder) for name in READABLE]
    command = [sys.executable, "-m", "tests.recipe.test_quantized_layouts", str(output), *folders]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return output


@pytest.mark.parametrize("name", READABLE)
def test_gptqmodel_reads_the_same(written: dict[str, Written], gptqmodel_results: Path, name: str) -> None:
    theirs = load_file(gptqmodel_results / f"{name}.safetensors")
    assert difference(theirs.pop("logits"), written[name].logits) < LAYOUTS[name].tolerance
    assert theirs.keys() == written[name].weights.keys()
    for weight, expected in written[name].weights.items():
        assert torch.equal(theirs[weight], expected.half()), weight


@torch.no_grad()
def run_gptqmodel(output: Path, folders: list[Path]) -> None:
    """Write logits and float16 weights of gptqmodel's plain layers to ``output``."""
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear
    from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

    from qwen_model.register import register_qwen

    register_qwen()
    torch.compiler.set_stance("force_eager")  # gptqmodel compiles each layer, which would take most of the time
    ids = load_file(output / "ids.safetensors")["ids"]
    for folder in folders:
        quantization = find_quantization(folder)
        assert quantization is not None
        # The kernels that it prefers on a CPU multiply in bfloat16 and do not support groups of 16.
        plain = AwqConfig(backend="torch_awq") if quantization.method == "awq" else None
        plain = plain or GPTQConfig(bits=quantization.bits, backend="gptq_torch")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=plain).eval()
        tensors = {"logits": model(input_ids=ids).logits.float()}
        for name, layer in model.named_modules():
            if isinstance(layer, BaseQuantLinear):
                layer.bias = None
                tensors[f"{name}.weight"] = layer(torch.eye(layer.in_features, dtype=torch.float16)).T.contiguous()
        save_file(tensors, output / f"{folder.name}.safetensors")


if __name__ == "__main__":
    run_gptqmodel(Path(sys.argv[1]), [Path(folder) for folder in sys.argv[2:]])
