"""Every command that opens weights refuses a tampered checkpoint in one line, before it writes anything."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import finetune
import merge_lora
from scripts import ask, convert_layout, preview_data, quantize
from tests.commands import finetune_here, run_here
from tests.models import TINY, change_json, copy_checkpoint, write_conversations
from tests.quantized import write_gptq

WEIGHTS = "model.safetensors"
LAYER = "transformer.h.1.mlp.w1"
BATCH = ("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, golden_small: Path) -> Path:
    """A folder with data, an adapter, and a finished run of the untampered checkpoint."""
    folder = tmp_path_factory.mktemp("inputs")
    write_conversations(folder / "train.json")
    shutil.copytree(golden_small / "training" / "lora_chat_adapter", folder / "adapter")
    finetune_here(
        "--model_name_or_path", TINY, "--data_path", folder / "train.json", "--output_dir", folder / "run",
        "--use_lora", "--max_steps", 1, "--save_steps", 1, *BATCH,
    )  # fmt: skip
    return folder


Arguments = Callable[[Path, Path, Path], list[object]]
"""Checkpoint, inputs and output -> arguments of a command."""


def finetune_arguments(*flags: str) -> Arguments:
    return lambda model, inputs, output: [
        "--model_name_or_path", model, "--data_path", inputs / "train.json", "--output_dir", output, "--max_steps", 1,
        "--use_cpu", "True", *BATCH, *flags,
    ]  # fmt: skip


COMMANDS: dict[str, tuple[Any, Arguments]] = {
    "finetune": (finetune, finetune_arguments()),
    "finetune --use_lora": (finetune, finetune_arguments("--use_lora", "--q_lora")),
    "resume": (
        finetune,
        lambda model, inputs, output: [
            *finetune_arguments("--use_lora")(model, inputs, output),
            "--resume_from_checkpoint", inputs / "run" / "checkpoint-1",
        ],
    ),
    "preview_data": (
        preview_data,
        lambda model, inputs, output: ["--model_name_or_path", model, "--data_path", inputs / "train.json"],
    ),
    "ask": (ask, lambda model, inputs, output: ["--model_name_or_path", model, "--max_new_tokens", 1, "Hi"]),
    "merge_lora": (
        merge_lora,
        lambda model, inputs, output: ["--adapter", inputs / "adapter", "--base", model, "--output", output],
    ),
    "merge_lora --no_verify": (
        merge_lora,
        lambda model, inputs, output: [
            "--adapter", inputs / "adapter", "--base", model, "--output", output, "--layout", "qwen2", "--no_verify",
        ],
    ),
    "convert_layout": (convert_layout, lambda model, inputs, output: [model, output]),
    "convert_layout --dtype": (convert_layout, lambda model, inputs, output: [model, output, "--dtype", "fp32"]),
    "quantize": (
        quantize,
        lambda model, inputs, output: [
            "--model_name_or_path", model, "--data_path", inputs / "train.json", "--output_dir", output,
            "--group_size", "32",
        ],
    ),
}  # fmt: skip

Change = Callable[[dict[str, Tensor]], object]


def change(edit: Change) -> Callable[[Path], None]:
    """Return a function that edits the weights in a checkpoint's folder."""

    def tamper(folder: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
        edit(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return tamper


def truncate(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-8])


def change_quantization(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    change_json(folder / "config.json", quantization_config=config | values)


def without_groups(folder: Path) -> None:
    change(lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith("g_idx")])(folder)
    change_quantization(folder, group_size=64)


PLAIN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing tensor": (change(lambda tensors: tensors.pop(f"{LAYER}.weight")), f"{LAYER}.weight"),
    "three tensors": (
        change(lambda tensors: [tensors.pop(name) for name in list(tensors)[3:]]), "the weights have ",
    ),
    "extra layer": (lambda folder: change_json(folder / "config.json", num_hidden_layers=1), "transformer.h.1"),
    "missing layer": (lambda folder: change_json(folder / "config.json", num_hidden_layers=3), "transformer.h.2"),
    "vision": (
        change(lambda tensors: tensors.update({"transformer.visual.proj": torch.ones(4, 4)})),
        "transformer.visual.proj",
    ),
    "value head": (change(lambda tensors: tensors.update({"v_head.bias": torch.ones(1)})), "v_head.bias"),
    "wrong shape": (
        change(lambda tensors: tensors.update({f"{LAYER}.weight": torch.ones(64, 31)})), f"{LAYER}.weight [64, 31]",
    ),
    "wrong dtype": (
        change(lambda tensors: tensors.update({f"{LAYER}.weight": torch.ones(64, 32, dtype=torch.int32)})),
        f"{LAYER}.weight is stored as int32",
    ),
    "NaN": (
        change(lambda tensors: tensors[f"{LAYER}.weight"][3].fill_(float("nan"))), "holds NaN or infinity",
    ),
    "truncated file": (truncate, f"{WEIGHTS} is damaged or incomplete"),
}  # fmt: skip
PACKED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing part": (change(lambda tensors: tensors.pop(f"{LAYER}.scales")), f"{LAYER}.scales is missing"),
    "missing layer": (
        change(lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(f"{LAYER}.")]),
        f"{LAYER}.weight",
    ),
    "no g_idx and another group size": (without_groups, "has the shape"),
    "g_idx out of range": (change(lambda tensors: tensors[f"{LAYER}.g_idx"][5].fill_(9)), "g_idx names group 9"),
    "wrong shape": (
        change(lambda tensors: tensors.update({f"{LAYER}.qzeros": tensors[f"{LAYER}.qzeros"][:, :7].clone()})),
        f"{LAYER}.qzeros has the shape [1, 7]",
    ),
    "wrong dtype": (
        change(lambda tensors: tensors.update({f"{LAYER}.qweight": tensors[f"{LAYER}.qweight"].long()})),
        f"{LAYER}.qweight is stored as int64",
    ),
    "NaN": (
        change(lambda tensors: tensors[f"{LAYER}.scales"][0].fill_(float("nan"))), "NaN or infinity",
    ),
    "not packed": (
        lambda folder: shutil.copyfile(TINY / WEIGHTS, folder / WEIGHTS), "but no weight is quantised",
    ),
}  # fmt: skip
# The preview reads headers only; whether the weights of a run changed is compared before they are read.
NOT_READ = [("preview_data", "NaN"), ("resume", "NaN")]


def refuses(command: str, folder: Path, inputs: Path, output: Path, expected: str) -> None:
    module, arguments = COMMANDS[command]
    before = (folder / WEIGHTS).read_bytes()
    with redirect_stdout(io.StringIO()) as stdout, redirect_stderr(io.StringIO()) as stderr:
        code = run_here(module.main, command.split()[0], arguments(folder, inputs, output))
    lines = stderr.getvalue().strip().splitlines()
    assert code == 2, stderr.getvalue()
    assert expected in lines[-1] and "Traceback" not in stderr.getvalue() and "unexpected" not in lines[-1], lines[-1]
    assert stdout.getvalue() == ""
    assert not output.exists() and not list(output.parent.glob("*.partial*"))
    assert (folder / WEIGHTS).read_bytes() == before


def cases(faults: Iterable[str], without: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Return the pairs of a command and a fault."""
    pairs = [(command, fault) for command in COMMANDS if command not in without for fault in faults]
    return [pair for pair in pairs if pair not in NOT_READ]


@pytest.mark.parametrize(("command", "fault"), cases(PLAIN))
def test_tampered_checkpoint(command: str, fault: str, inputs: Path, tmp_path: Path) -> None:
    tamper, expected = PLAIN[fault]
    folder = copy_checkpoint(tmp_path / "model")
    tamper(folder)
    refuses(command, folder, inputs, tmp_path / "out", expected)


@pytest.mark.parametrize(("command", "fault"), cases(PACKED, without=("finetune", "resume", "quantize")))
def test_tampered_quantised_checkpoint(command: str, fault: str, inputs: Path, tmp_path: Path) -> None:
    tamper, expected = PACKED[fault]
    write_gptq(TINY, tmp_path / "model")
    tamper(tmp_path / "model")
    refuses(command, tmp_path / "model", inputs, tmp_path / "out", expected)
