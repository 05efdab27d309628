"""Methods beside plain LoRA: each changes what it should, resumes to the same bits, and merges as it was trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qwen_model.register import register_qwen
from tests.commands import finetune_here, logged_losses, read_json, read_log
from tests.merging import merge_well
from tests.models import CONVERSATIONS, TINY, write_conversations
from tests.quantized import write_gptq

register_qwen()
IDS = torch.arange(60).reshape(2, 30)
RANK, ALPHA = 4, 8
TIMED = ("elapsed", "tokens_per_second", "peak_memory_gib", "eta_seconds")


def train(folder: Path, *flags: object, model: Path = TINY) -> Any:
    """Train four steps with checkpoints, and return the run's log."""
    data = write_conversations(folder.parent / "train.json", CONVERSATIONS * 2)
    return finetune_here(
        "--model_name_or_path", model, "--data_path", data, "--output_dir", folder, "--max_steps", 4, "--save_steps", 2,
        "--save_strategy", "steps", "--logging_steps", 1, "--learning_rate", 1e-2, "--per_device_train_batch_size", 3,
        "--use_lora", "--lora_r", RANK, "--lora_alpha", ALPHA, *flags,
    )  # fmt: skip


def adapter(folder: Path) -> dict[str, Tensor]:
    return dict(load_file(folder / "adapter_model.safetensors"))


def rows(folder: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in TIMED} for row in read_log(folder)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "out"
    train(folder)
    return folder


def layers_of(model: Any) -> dict[str, Any]:
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A") and len(layer.lora_A)}


def has_scale_of_root(model: Any, folder: Path, plain: Path) -> None:
    assert {layer.scaling["default"] for layer in layers_of(model).values()} == {ALPHA / math.sqrt(RANK)}
    assert read_json(folder / "adapter_config.json")["use_rslora"] is True


def has_ranks_by_name(model: Any, folder: Path, plain: Path) -> None:
    for name, layer in layers_of(model).items():
        rank = 2 if name.endswith("w1") else 6 if name.endswith("h.0.attn.c_attn") else RANK
        assert layer.lora_A["default"].weight.shape[0] == rank, name
        assert layer.scaling["default"] == (3 if name.endswith("mlp.c_proj") else ALPHA) / rank, name


def has_trained_norms(model: Any, folder: Path, plain: Path) -> None:
    for layer in layers_of(model).values():
        norms = layer.get_base_layer().weight.norm(dim=1)
        assert not torch.allclose(layer.lora_magnitude_vector["default"].weight, norms, rtol=1e-4)
    assert any(name.endswith("lora_magnitude_vector") for name in adapter(folder))


def is_saved_with_twice_the_rank(model: Any, folder: Path, plain: Path) -> None:
    config = read_json(folder / "adapter_config.json")
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (2 * RANK, 2 * ALPHA, True)
    assert {len(tensor) for name, tensor in adapter(folder).items() if "lora_A" in name} == {2 * RANK}


def has_larger_rate_of_second(model: Any, folder: Path, plain: Path) -> None:
    log = rows(folder)
    assert [row["lr_b"] for row in log] == pytest.approx([16 * row["lr"] for row in log])
    assert [row["lr"] for row in log] == [row["lr"] for row in rows(plain)]
    # Adam's first step, of a matrix that begins as zeros, is the learning rate in every element.
    steps = [load_file(each / "checkpoint-2" / "adapter_model.safetensors") for each in (folder, plain)]
    sizes = [torch.cat([step[name].abs().flatten() for name in step if "lora_B" in name]).max() for step in steps]
    assert 8 < sizes[0] / sizes[1] < 32


def draws_other_values(model: Any, folder: Path, plain: Path) -> None:
    first, second = adapter(folder), adapter(plain)
    assert not any(torch.allclose(first[name], second[name], rtol=0.1) for name in first if "lora_A" in name)


def has_two_factors_at_first(model: Any, folder: Path, plain: Path) -> None:
    assert min(tensor.abs().mean() for name, tensor in adapter(folder).items() if "lora_B" in name) > 0.02
    draws_other_values(model, folder, plain)


def has_other_losses(model: Any, folder: Path, plain: Path) -> None:
    assert abs(logged_losses(folder)[0] - logged_losses(plain)[0]) > 1e-4
    assert not model.get_input_embeddings()._forward_hooks  # what follows the training is without noise


@dataclass(frozen=True)
class Method:
    """A method: its flags, what it must have changed, and how records name it."""

    flags: tuple[object, ...]
    check: Callable[[Any, Path, Path], None]
    name: str
    merges: bool = False
    begins_as_base: bool = True


METHODS = {
    "rslora": Method(("--use_rslora",), has_scale_of_root, "rsLoRA", merges=True),
    "patterns": Method(
        ("--lora_rank_pattern", '{"w1": 2, "h.0.attn.c_attn": 6}', "--lora_alpha_pattern", '{"mlp.c_proj": 3}'),
        has_ranks_by_name, "ranks by pattern, alphas by pattern", merges=True,
    ),
    "dora": Method(("--use_dora",), has_trained_norms, "DoRA", merges=True),
    "pissa": Method(
        ("--init_lora_weights", "pissa"), is_saved_with_twice_the_rank, "begins as pissa", merges=True
    ),
    "olora": Method(
        ("--init_lora_weights", "OLoRA", "--weight_decay", 0.1), is_saved_with_twice_the_rank, "begins as olora",
        merges=True,
    ),
    "gaussian": Method(("--init_lora_weights", "gaussian"), draws_other_values, "begins as gaussian"),
    "orthogonal": Method(("--init_lora_weights", "orthogonal"), has_two_factors_at_first, "begins as orthogonal"),
    "lora plus": Method(("--loraplus_lr_ratio", 16), has_larger_rate_of_second, "LoRA+ 16"),
    "neftune": Method(("--neftune_noise_alpha", 5), has_other_losses, "NEFTune 5", begins_as_base=False),
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_a_method_changes_what_it_should_resumes_and_merges(tmp_path: Path, plain: Path, name: str) -> None:
    method, output = METHODS[name], tmp_path / "out"
    run = train(output, *method.flags)
    method.check(run.model, output, plain)
    assert read_json(output / "run_summary.json")["method"] == method.name
    if method.begins_as_base:
        assert logged_losses(output)[0] == pytest.approx(logged_losses(plain)[0], rel=1e-5)
    assert logged_losses(output)[1:] != logged_losses(plain)[1:]

    again = tmp_path / "again"
    resumed = train(again, *method.flags, "--resume_from_checkpoint", output / "checkpoint-2")
    assert len(resumed.gradients) == 2
    first, second = adapter(again), adapter(output)
    assert first.keys() == second.keys() and all(torch.equal(first[each], second[each]) for each in first)
    assert rows(again) == rows(output)[2:]

    if method.merges:
        model = run.model.eval()
        with torch.no_grad():
            expected = model(input_ids=IDS).logits
            learnt = expected - AutoModelForCausalLM.from_pretrained(TINY).eval()(input_ids=IDS).logits
        for adapter_folder in (output, output / "checkpoint-4"):
            merged = tmp_path / f"merged-{adapter_folder.name}"
            merge_well("--adapter", adapter_folder, "--base", TINY, "--output", merged)
            with torch.no_grad():
                actual = AutoModelForCausalLM.from_pretrained(merged).eval()(input_ids=IDS).logits
            assert (actual - expected).norm() < 1e-3 * learnt.norm()
        assert method.name in (merged.parent / "merged-out" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["nf4", "int8", "gptq"])
def test_dora_beside_quantised_weights_merges_into_what_was_trained(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    base, output, merged = TINY, tmp_path / "out", tmp_path / "merged"
    if kind == "gptq":
        base = tmp_path / "base"
        write_gptq(TINY, base, bits=4, group_size=32)
    flags = ["--q_lora", "--use_dora", *(["--load_in_8bit"] if kind == "int8" else [])]
    model = train(output, *flags, model=base).model.eval()
    matched = [] if kind == "gptq" else ["--match_quantised_base"]
    merge_well("--adapter", output, "--base", base, "--output", merged, "--dtype", "fp32", *matched)
    with torch.no_grad():
        expected, actual = (
            each(input_ids=IDS).logits for each in (model, AutoModelForCausalLM.from_pretrained(merged).eval())
        )
        with model.disable_adapter():
            learnt = expected - model(input_ids=IDS).logits
    error = (actual - expected).norm() / learnt.norm()
    assert error < (0.2 if kind == "int8" else 1e-3)  # its products round their inputs to 8 bits too


def test_a_resumed_run_takes_both_learning_rates_of_the_command(tmp_path: Path) -> None:
    flags = ("--loraplus_lr_ratio", 4, "--lr_scheduler_type", "constant")
    train(tmp_path / "out", *flags)
    checkpoint = tmp_path / "out" / "checkpoint-2"
    train(tmp_path / "again", *flags, "--learning_rate", 1e-3, "--resume_from_checkpoint", checkpoint)
    assert {(row["lr"], row["lr_b"]) for row in rows(tmp_path / "again")} == {(1e-3, 4e-3)}
