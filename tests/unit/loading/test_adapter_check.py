"""Adapters are checked as for a merge before weights are loaded: options, values, fit, the base of their training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import merge_lora
from checkpoints.shards import fingerprint
from errors import ConfigError
from loading.adapter_check import check_adapter
from loading.checkpoint import load_checkpoint
from scripts import ask, quantize
from tests.commands import finetune_here
from tests.models import TINY, change_json, copy_checkpoint, write_conversations, write_later_checkpoint

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model.transformer.h.0"


@pytest.fixture
def adapter(golden_small: Path, tmp_path: Path) -> Path:
    return shutil.copytree(golden_small / "training" / "lora_chat_adapter", tmp_path / "adapter")


def record(adapter: Path, **summary: object) -> None:
    (adapter / "run_summary.json").write_text(json.dumps(summary))


def change(adapter: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(adapter / WEIGHTS).items()}
    edit(tensors)
    save_file(tensors, adapter / WEIGHTS)


def as_pissa(adapter: Path) -> None:
    change_json(adapter / "adapter_config.json", init_lora_weights="pissa")


def with_unknown_option(adapter: Path) -> None:
    change_json(adapter / "adapter_config.json", arrow_config={"top_k": 2})


def with_nan(adapter: Path) -> None:
    change(adapter, lambda tensors: tensors[f"{PREFIX}.mlp.w1.lora_B.weight"][0].fill_(float("nan")))


def with_deeper_layer(adapter: Path) -> None:
    rows = {f"lora_{letter}": torch.ones(size) for letter, size in (("A", (2, 32)), ("B", (64, 2)))}
    names = {name: f"base_model.model.transformer.h.7.mlp.w1.{name}.weight" for name in rows}
    change(adapter, lambda tensors: tensors.update({names[name]: rows[name] for name in rows}))


def without_b(adapter: Path) -> None:
    change(adapter, lambda tensors: tensors.pop(f"{PREFIX}.mlp.w1.lora_B.weight"))


def of_another_base(adapter: Path) -> None:
    record(adapter, base_fingerprint="0" * 64)


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "NaN": (with_nan, "w1.lora_B.weight holds NaN or infinity"),
    "initialisation": (as_pissa, "init_lora_weights pissa trains on a changed copy of the base"),
    "option": (with_unknown_option, "arrow_config"),
    "deeper layer": (with_deeper_layer, "transformer.h.7.mlp.w1.lora_A.weight fits no tensor of the base"),
    "missing matrix": (without_b, "is saved without its lora_B"),
    "other weights": (of_another_base, "was trained on other weights than those of"),
}


def continue_training(folder: Path, adapter: Path, *flags: object) -> Any:
    data = write_conversations(folder / "train.json")
    return finetune_here(
        "--model_name_or_path", TINY, "--data_path", data, "--output_dir", folder / "out", "--use_lora",
        "--lora_weight_path", adapter, "--max_steps", 1, "--save_strategy", "no", *flags,
    )  # fmt: skip


def ask_it(folder: Path, adapter: Path, *flags: object) -> None:
    question = ["--model_name_or_path", TINY, "--adapter", adapter, "--max_new_tokens", 1, "Hi", *flags]
    ask.main([str(argument) for argument in question])


def merge_it(folder: Path, adapter: Path, *flags: object) -> None:
    arguments = ["--adapter", adapter, "--base", TINY, "--output", folder / "merged", "--no_verify", *flags]
    merge_lora.main([str(argument) for argument in arguments])


COMMANDS: list[Callable[..., Any]] = [merge_it, ask_it, continue_training]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_the_same_adapters(
    command: Callable[..., Any], fault: str, adapter: Path, tmp_path: Path
) -> None:
    damage, expected = FAULTS[fault]
    damage(adapter)
    with pytest.raises(ConfigError) as caught:
        command(tmp_path, adapter)
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() and not (tmp_path / "merged").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_weights_of_the_training_pass_and_others_with_a_flag(
    command: Callable[..., Any], adapter: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    record(adapter, base_fingerprint="0" * 64)
    command(tmp_path, adapter, "--any_base")
    assert "was trained on other weights than those of" in capfd.readouterr().err
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    shutil.rmtree(tmp_path / "merged", ignore_errors=True)
    record(adapter, base_fingerprint=fingerprint(TINY))
    command(tmp_path, adapter)


def test_flag_in_the_fix_is_that_of_the_command(adapter: Path, tmp_path: Path) -> None:
    of_another_base(adapter)
    with pytest.raises(ConfigError, match=r"^--lora_weight_path .* Give the right base with --model_name_or_path; "):
        check_adapter(load_checkpoint(str(TINY)), str(adapter), "--lora_weight_path")


def test_bad_adapter_is_refused_before_the_base_is_read(adapter: Path) -> None:
    with_nan(adapter)
    with pytest.raises(ConfigError, match="holds NaN"):
        ask.main(["--model_name_or_path", "nowhere", "--adapter", str(adapter), "Hi"])


def test_adapter_of_another_layout_is_refused(adapter: Path, tmp_path: Path) -> None:
    base = load_checkpoint(str(write_later_checkpoint(tmp_path / "qwen2", "qwen2")))
    with pytest.raises(ConfigError, match=r"^--adapter .* fits no tensor of the base"):
        check_adapter(base, str(adapter), "--adapter")


def test_lora_bias_of_a_layer_without_bias_can_be_asked_and_continued_but_not_merged(
    adapter: Path, tmp_path: Path
) -> None:
    name = f"{PREFIX}.mlp.w1.lora_B.bias"
    change(adapter, lambda tensors: tensors.update({name: torch.ones(64)}))
    check_adapter(load_checkpoint(str(TINY)), str(adapter), "--adapter")
    with pytest.raises(ConfigError, match=r"has no bias to merge it into"):
        merge_it(tmp_path, adapter)
    change(adapter, lambda tensors: tensors.update({name: torch.ones(63)}))
    with pytest.raises(ConfigError, match=r"lora_B\.bias has shape \(63,\), .* ask for \(64,\)"):
        check_adapter(load_checkpoint(str(TINY)), str(adapter), "--adapter")


def test_continuing_on_another_form_of_the_weights_is_said(
    adapter: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (adapter / "base_quantization.json").write_text(json.dumps(settings))
    continue_training(tmp_path, adapter)
    expected = "was trained on NF4 by bitsandbytes, this run continues it on weights as they are stored"
    assert expected in capfd.readouterr().err


# ----------------------------------------------------------------------------------------------- folders of other kinds


@pytest.mark.parametrize("has_config", [False, True])
def test_adapter_given_as_a_model_names_the_flags(adapter: Path, tmp_path: Path, has_config: bool) -> None:
    if has_config:
        shutil.copyfile(TINY / "config.json", adapter / "config.json")
        shutil.copyfile(TINY / "qwen.tiktoken", adapter / "qwen.tiktoken")
    data = str(write_conversations(tmp_path / "train.json"))
    model, output = ["--model_name_or_path", str(adapter)], ["--output_dir", str(tmp_path / "out")]
    for command in (
        lambda: finetune_here(*model, *output, "--data_path", data, "--use_lora"),
        lambda: ask.main([*model, "Hi"]),
        lambda: quantize.main([*model, *output, "--data_path", data]),
        lambda: merge_lora.main(["--adapter", str(adapter), "--base", str(adapter), "--output", str(tmp_path / "out")]),
    ):
        with pytest.raises(ConfigError) as caught:
            command()
        message = str(caught.value)
        assert "It holds an adapter: give its base" in message, message
        assert "--adapter (scripts.ask, merge_lora.py) or --lora_weight_path (finetune.py)" in message


def test_model_given_as_an_adapter_is_said(tmp_path: Path) -> None:
    for command in COMMANDS[:2]:
        with pytest.raises(ConfigError, match=r"holds no adapter_config\.json: it is the folder of a model"):
            command(tmp_path, copy_checkpoint(tmp_path / "model" / command.__name__))
