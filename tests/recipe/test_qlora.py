"""Adapters on quantised weights of every kind: they train, nothing else changes, and they reload and merge."""

from __future__ import annotations

import copy
import importlib.util
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import merge_lora
from checkpoints.model_config import Quantization
from checkpoints.shards import open_checkpoint
from console import pip_command
from loading.adapters import load_adapter
from loading.checkpoint import load_checkpoint, load_model
from loading.inference import load_for_inference
from loading.quantized import QuantizedLinear
from qwen_model.block_runner import architecture_of_model, blocks_of
from scripts import ask, make_tiny_qwen
from tests.commands import Recorder, finetune_here, logged_losses, read_json, run, run_here
from tests.models import TINY, copy_checkpoint, write_conversations, write_later_checkpoint
from tests.quantized import write_awq, write_gptq

CORPUS = "corpora/fastchat_dummy_conversation.json"
NF4, INT8 = ["--q_lora"], ["--q_lora", "--load_in_8bit"]
# Function that quantises a checkpoint on disk, and the flags besides --use_lora.
KINDS: dict[str, tuple[Callable[[Path, Path], object] | None, list[str]]] = {
    "nf4": (None, NF4),
    "fp4": (None, [*NF4, "--quant_type", "fp4"]),
    "int8": (None, INT8),
    "gptq-int4": (lambda source, target: write_gptq(source, target, bits=4, group_size=32), NF4),
    "gptq-int8": (lambda source, target: write_gptq(source, target, bits=8, group_size=32), NF4),
    "gptq-act-order": (lambda source, target: write_gptq(source, target, bits=4, group_size=32, desc_act=True), NF4),
    "awq": (lambda source, target: write_awq(source, target, group_size=32), NF4),
}
ON_LOAD = {"nf4": Quantization("nf4", 4), "fp4": Quantization("fp4", 4), "int8": Quantization("int8", 8)}
LATER = {"qwen2": ("nf4", "gptq-int4"), "qwen3": ("nf4", "awq")}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Qwen v1 of every kind, also with groups of 128, and Qwen2 and Qwen3 of two kinds."""
    folder = tmp_path_factory.mktemp("models")
    plain = {"qwen": folder / "qwen"}
    make_tiny_qwen.main(["--output", str(plain["qwen"])])
    for model_type in LATER:
        plain[model_type] = write_later_checkpoint(folder / model_type, model_type, dtype=torch.bfloat16)
    write_gptq(plain["qwen"], folder / "wide-gptq", bits=4, group_size=128)
    folders = {"wide-gptq-int4": folder / "wide-gptq"}
    for model_type, source in plain.items():
        for kind in LATER.get(model_type, KINDS):
            write = KINDS[kind][0]
            target = folder / f"{model_type}-{kind}"
            if write is not None:
                write(source, target)
            folders[f"{model_type}-{kind}"] = source if write is None else target
    return folders


NAMES = [f"qwen-{kind}" for kind in KINDS] + ["wide-gptq-int4"]
NAMES += [f"{model_type}-{kind}" for model_type, kinds in LATER.items() for kind in kinds]
USUAL = ("qwen-nf4", "qwen-gptq-int4", "qwen-awq", "qwen2-gptq-int4", "qwen3-nf4")  # the others are long
TRAINED = [name if name in USUAL else pytest.param(name, marks=pytest.mark.long) for name in NAMES]


def kind_of(name: str) -> str:
    return name.partition("-")[2]


def load(name: str, folder: Path) -> Any:
    """Load a model, quantised as its name says, computing in float32."""
    return load_model(load_checkpoint(str(folder)), torch.float32, quantize=ON_LOAD.get(kind_of(name)))


@pytest.fixture(scope="module")
def runs(
    models: dict[str, Path], shared: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Recorder]]:
    """A function that trains on real conversations once per name: output folder and recorder."""
    folder, done = tmp_path_factory.mktemp("runs"), {}

    def get(name: str) -> tuple[Path, Recorder]:
        if name not in done:
            output = folder / name
            recorder = finetune_here(
                "--model_name_or_path", models[name], "--data_path", shared / CORPUS,
                "--output_dir", output, "--use_lora", *KINDS[kind_of(name)][1], "--lora_dropout", 0, "--lora_alpha", 64,
                "--learning_rate", 5e-3, "--max_steps", 20, "--per_device_train_batch_size", 4, "--logging_steps", 1,
                "--model_max_length", 192, "--save_strategy", "no", "--gradient_checkpointing",
                "--trainable_embeddings", "full" if name.startswith("qwen-") else "none",
            )  # fmt: skip
            done[name] = output, recorder
        return done[name]

    return get


def frozen_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the base by their names there, without those of the adapter."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "lora_" not in name and "modules_to_save" not in name:
            base_name = name.removeprefix("base_model.model.")
            yield base_name.replace(".base_layer", "").replace(".original_module", ""), tensor


def dequantised_weight(layer: nn.Module) -> Tensor:
    """The weight [O, I] of a quantised layer in float32."""
    if isinstance(layer, QuantizedLinear):
        return layer.weight
    if isinstance(layer, bitsandbytes.nn.Linear8bitLt):
        eight: Any = layer.weight
        return eight.data.float() * (eight.SCB / 127)[:, None]
    # Block by block: bitsandbytes' CPU kernel misreads rows that are not whole blocks.
    weight: Any = layer.weight
    state, packed = weight.quant_state, weight.data.flatten()
    scales = bitsandbytes.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    values = torch.stack([packed >> 4, packed & 15], -1).flatten().long()
    return (state.code[values].view(-1, state.blocksize) * scales[:, None]).view(state.shape)


def dense(model: Any) -> Any:
    """Return a copy of a quantised model with dequantised linear layers."""
    copied, replaced = copy.deepcopy(model), 0
    for name, layer in model.named_modules():
        if isinstance(layer, (QuantizedLinear, bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)):
            linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            linear.weight.data = dequantised_weight(layer)
            if layer.bias is not None:
                linear.bias.data = layer.bias.float()
            copied.set_submodule(name, linear)
            replaced += 1
    assert replaced == len(blocks_of(model)) * len(architecture_of_model(model).linear_layers)
    return copied


IDS = torch.tensor([[5, 39, 72, 198, 5, 6, 7, 300, 400, 12, 13, 14]])


@pytest.mark.parametrize("name", TRAINED)
def test_training_lowers_the_loss_and_keeps_the_quantised_weights(
    name: str, models: dict[str, Path], runs: Callable[[str], tuple[Path, Recorder]]
) -> None:
    output, recorder = runs(name)
    losses = logged_losses(output)
    assert losses[-1] < losses[0] - (2.0 if name.startswith("qwen-") else 0.3)
    before, after = dict(frozen_tensors(load(name, models[name]))), dict(frozen_tensors(recorder.model))
    assert before.keys() == after.keys()
    for tensor_name, tensor in before.items():
        assert tensor.dtype == after[tensor_name].dtype and torch.equal(tensor, after[tensor_name]), tensor_name
    trained = [parameter for parameter in recorder.model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}


@pytest.mark.parametrize("name", TRAINED)
def test_reloaded_adapter_gives_the_trained_logits(
    name: str, models: dict[str, Path], runs: Callable[[str], tuple[Path, Recorder]]
) -> None:
    output, recorder = runs(name)
    checkpoint = load_checkpoint(str(models[name]))
    reopened = load_for_inference(checkpoint, str(output))
    with torch.no_grad():
        trained, again = (model.eval()(input_ids=IDS).logits for model in (recorder.model, reopened))
    # The adapter is saved in the base's precision.
    tolerance = 1e-6 if checkpoint.dtype == torch.float32 else 3e-2
    assert (again - trained).norm() <= tolerance * trained.norm()
    assert not torch.equal(load_for_inference(checkpoint)(input_ids=IDS).logits, again)


@pytest.mark.parametrize("name", [name for name in NAMES if "int8" not in name or "gptq" in name])
def test_logits_equal_those_of_the_dequantised_model(name: str, models: dict[str, Path]) -> None:
    model = load(name, models[name])
    with torch.no_grad():
        quantised, expected = model(input_ids=IDS).logits, dense(model)(input_ids=IDS).logits
    assert (quantised - expected).norm() <= 1e-3 * expected.norm()


def test_weights_keep_their_stored_dtype_in_memory(models: dict[str, Path]) -> None:
    for name, dtypes in (
        ("qwen-gptq-int4", {torch.float16}),
        ("qwen2-nf4", {torch.bfloat16, torch.uint8}),
        ("qwen3-awq", {torch.float16}),
    ):
        model = load(name, models[name])
        assert {tensor.dtype for tensor in model.parameters()} == dtypes
        assert model(input_ids=IDS).logits.dtype == torch.float32


def test_bfloat16_training(models: dict[str, Path], tmp_path: Path) -> None:
    data = write_conversations(tmp_path / "train.json")
    losses = []
    for precision in ([], ["--bf16"]):
        finetune_here(
            "--model_name_or_path", models["qwen2-gptq-int4"], "--data_path", data, "--output_dir", tmp_path / "out",
            "--use_lora", "--q_lora", "--max_steps", 4, "--logging_steps", 1, "--overwrite_output_dir",
            "--save_strategy", "no", "--learning_rate", 1e-2, *precision,
        )  # fmt: skip
        losses.append(logged_losses(tmp_path / "out"))
    assert losses[1] == pytest.approx(losses[0], rel=0.01) and losses[1] != losses[0]


@pytest.mark.parametrize("kind", ["nf4", "gptq-int4"])
def test_full_logits_and_gradient_checkpointing_give_the_same_gradients(
    kind: str, models: dict[str, Path], tmp_path: Path
) -> None:
    data, runs = write_conversations(tmp_path / "train.json"), []
    for number, flags in enumerate(([], ["--loss", "full_logits"], ["--gradient_checkpointing"])):
        recorder = finetune_here(
            "--model_name_or_path", models[f"qwen-{kind}"], "--data_path", data, "--output_dir", tmp_path / str(number),
            "--use_lora", "--q_lora", "--max_steps", 2, "--logging_steps", 1, "--save_strategy", "no",
            "--trainable_embeddings", "chatml_tokens", "--lora_dropout", 0, *flags,
        )  # fmt: skip
        runs.append((logged_losses(tmp_path / str(number)), recorder.gradients[0]))
    for losses, gradients in runs[1:]:
        assert losses == pytest.approx(runs[0][0], rel=1e-5)
        assert gradients.keys() == runs[0][1].keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, runs[0][1][name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["nf4", "gptq-int4"])
def test_evaluation_and_resuming_do_not_change_the_losses(kind: str, models: dict[str, Path], tmp_path: Path) -> None:
    """On some processors, bitsandbytes repacks weights in evaluation and then computes without gradients."""
    data = write_conversations(tmp_path / "train.json")

    def train(name: str, *flags: object) -> list[float]:
        finetune_here(
            "--model_name_or_path", models[f"qwen-{kind}"], "--data_path", data, "--output_dir", tmp_path / name,
            "--use_lora", "--q_lora", "--max_steps", 6, "--logging_steps", 1, "--save_steps", 3,
            "--lora_dropout", 0, "--learning_rate", 5e-3, *flags,
        )  # fmt: skip
        return logged_losses(tmp_path / name)

    plain = train("plain")
    evaluated = train("evaluated", "--eval_data_path", data, "--eval_strategy", "steps", "--eval_steps", 1)
    assert evaluated == plain
    resumed = train("resumed", "--resume_from_checkpoint", tmp_path / "plain" / "checkpoint-3")
    # A checkpoint contains the adapter in the base's precision.
    assert resumed == pytest.approx(plain[3:], rel=1e-6 if kind == "nf4" else 1e-3)


def test_base_model_trains_its_embeddings(models: dict[str, Path], tmp_path: Path) -> None:
    base = copy_checkpoint(tmp_path / "base", models["qwen-gptq-int4"], chat_format="raw")
    recorder = finetune_here(
        "--model_name_or_path", base, "--data_path", write_conversations(tmp_path / "train.json"), "--output_dir",
        tmp_path / "out", "--use_lora", "--q_lora", "--max_steps", 2, "--learning_rate", 1e-2,
    )  # fmt: skip
    assert read_json(tmp_path / "out" / "run_summary.json")["trainable_embeddings"]["mode"] == "full"
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    stored = load_file(base / "model.safetensors")
    for name in ("transformer.wte.weight", "lm_head.weight"):
        assert not torch.equal(saved[f"base_model.model.{name}"], stored[name]), name
    assert {p.dtype for p in recorder.model.parameters() if p.requires_grad} == {torch.float32}


def test_published_layouts_load(golden_small: Path, tmp_path: Path) -> None:
    """August 2023: no quant_method, a separate config, weights under another name, a bias for every layer."""
    source, expected = golden_small / "tiny-qwen-small", None
    for number, options in enumerate(
        (
            {"config": "new"},
            {"config": "2023", "zero_biases": True},
            {"config": "quantize_config.json", "zero_biases": True, "file_name": "gptq_model-4bit-32g"},
            {"zeros": "v2", "config": "new"},
        )
    ):
        target = tmp_path / str(number)
        write_gptq(source, target, bits=4, group_size=32, **options)
        logits = load("qwen-gptq-int4", target)(input_ids=IDS).logits
        expected = logits if expected is None else expected
        assert torch.equal(logits, expected)


@pytest.mark.parametrize(
    ("name", "title"), [("qwen3-nf4", "NF4 by bitsandbytes"), ("qwen3-awq", "AWQ, 4 bits, groups of 32")]
)
def test_asking_a_quantised_model(
    name: str, title: str, models: dict[str, Path], runs: Callable[[str], tuple[Path, Recorder]]
) -> None:
    output, _ = runs(name)
    assert read_json(output / "run_summary.json")["quantization"] == title
    question = ["--model_name_or_path", models[name], "--adapter", output, "--max_new_tokens", 4, "Hi"]
    assert run_here(ask.main, "scripts.ask", question) == 0


# ---------------------------------------------------------------------------------------------------------------- merge


def quantised_folder(name: str, models: dict[str, Path], folder: Path) -> Path:
    """Return a folder with the quantised model; write one if it is quantised while loading."""
    if kind_of(name) not in ON_LOAD:
        return models[name]
    load(name, models[name]).save_pretrained(folder)
    for file in models[name].iterdir():
        if not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
    return folder


@pytest.mark.parametrize("name", TRAINED)
def test_merging_into_the_quantised_base(
    name: str, models: dict[str, Path], runs: Callable[[str], tuple[Path, Recorder]], tmp_path: Path
) -> None:
    """The merged model is not quantised, and equals the dequantised base with its adapter."""
    output, _ = runs(name)
    base = quantised_folder(name, models, tmp_path / "base")
    merge = ["--adapter", output, "--base", base, "--output", tmp_path / "merged", "--dtype", "fp32"]
    if kind_of(name) in ON_LOAD:  # it was trained on the unquantised files
        merge.append("--any_base")
    assert run_here(merge_lora.main, "merge_lora.py", merge) == 0
    assert "quantization_config" not in read_json(tmp_path / "merged" / "config.json")
    plain = models[f"{'qwen' if name.startswith('wide') else name.partition('-')[0]}-nf4"]
    names = (set(open_checkpoint(folder).names()) for folder in (tmp_path / "merged", plain))
    assert next(names) == next(names)
    merged = load_model(load_checkpoint(str(tmp_path / "merged")), torch.float32)
    expected = load_adapter(dense(load(name, models[name])), str(output), "--adapter")
    with torch.no_grad():
        difference = merged(input_ids=IDS).logits - expected.eval()(input_ids=IDS).logits
    assert difference.abs().max() <= 1e-5 * max(1, expected(input_ids=IDS).logits.abs().max())


@pytest.mark.long
def test_peft_does_not_import_gptqmodel(models: dict[str, Path], tmp_path: Path) -> None:
    """gptqmodel is installed here; importing it prints a banner and patches other libraries."""
    assert importlib.util.find_spec("gptqmodel") is not None
    result = run(
        "-c", "import sys, finetune; finetune.main(sys.argv[1:]); print('gptqmodel' in sys.modules)",
        "--model_name_or_path", models["qwen2-gptq-int4"], "--data_path", write_conversations(tmp_path / "train.json"),
        "--output_dir", tmp_path / "out", "--use_lora", "--q_lora", "--max_steps", 1, "--save_strategy", "no",
        is_new=True,
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (0, "False\n"), result.stderr


def test_bitsandbytes_not_installed(tmp_path: Path) -> None:
    """Missing libraries are reported before the model is read, with the command that installs them."""
    hidden = "import sys; sys.modules['bitsandbytes'] = None; import importlib.util as u; find = u.find_spec; "
    hidden += "u.find_spec = lambda name, *rest: None if name == 'bitsandbytes' else find(name, *rest); "
    command = hidden + "import finetune; from commands import run_command; run_command(finetune.main, 'finetune.py')"
    result = run(
        "-c", command, "--model_name_or_path", TINY, "--data_path", write_conversations(tmp_path / "train.json"),
        "--output_dir", tmp_path / "out", "--use_lora", "--q_lora", is_new=True,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr == (
        "finetune.py: error: --q_lora (NF4 by bitsandbytes) needs bitsandbytes, which is not installed. "
        f"Install it: {pip_command('requirements_qlora.txt')}\n"
    )
