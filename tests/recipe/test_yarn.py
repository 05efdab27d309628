"""``--rope_scaling yarn``: longer samples in training, and the same positions in everything that a run leaves."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from chat.template import CHATML_TEMPLATE
from errors import ConfigError
from loading.checkpoint import load_checkpoint, load_model
from loading.inference import load_for_inference
from tests.commands import finetune_here
from tests.merging import merge, merge_well, message_of, read
from tests.models import change_json, write_conversations, write_later_checkpoint

SETTINGS = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
IDS = torch.randint(700, (1, 600), generator=torch.Generator().manual_seed(0))
FLAGS = ("--rope_scaling", "yarn", "--rope_factor", 4)


@pytest.fixture(scope="module", params=["qwen2", "qwen3", "older keys"])
def base(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    is_older = request.param == "older keys"
    model_type = "qwen2" if is_older else request.param
    folder = write_later_checkpoint(tmp_path_factory.mktemp("base") / "model", model_type, CHATML_TEMPLATE)
    keys = {"rope_parameters": None, "rope_theta": 5e5} if is_older else {"rope_parameters": {"rope_theta": 5e5}}
    change_json(folder / "config.json", **keys)
    return folder


def run(base: Path, output: Path, *flags: object) -> Path:
    words = ["Which", "day", "follows", "Monday"] * 75
    data = write_conversations(output.with_suffix(".json"), [[("user", "Hi"), ("assistant", " ".join(words))]])
    finetune_here(
        "--model_name_or_path", base, "--data_path", data, "--output_dir", output, "--max_steps", 1, "--save_strategy",
        "no", *FLAGS, "--model_max_length", 2048, "--learning_rate", 1e-2, *flags,
    )  # fmt: skip
    return output


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def check_config(folder: Path) -> None:
    config = read(folder)
    assert config["rope_scaling"] == SETTINGS and config["rope_parameters"] == SETTINGS | {"rope_theta": 5e5}
    assert config["rope_theta"] == 5e5 and config["max_position_embeddings"] == 2048


def test_full_result_computes_what_transformers_does(base: Path, tmp_path: Path) -> None:
    output = run(base, tmp_path / "full")
    check_config(output)
    ours = logits_of(load_model(load_checkpoint(str(output)), torch.float32))
    config = AutoConfig.from_pretrained(base)
    config.rope_parameters, config.max_position_embeddings = SETTINGS | {"rope_theta": 5e5}, 2048
    theirs = AutoModelForCausalLM.from_pretrained(output, config=config, dtype=torch.float32)
    assert torch.equal(ours, logits_of(theirs))
    unscaled = AutoModelForCausalLM.from_pretrained(
        output, config=AutoConfig.from_pretrained(base), dtype=torch.float32
    )
    assert not torch.allclose(ours, logits_of(unscaled), atol=1e-2)


def test_adapter_keeps_its_positions_in_use_and_merge(base: Path, tmp_path: Path) -> None:
    adapter = run(base, tmp_path / "adapter", "--use_lora", "--lora_alpha", 64)
    assert read(adapter, "base_rope.json") == {"factor": 4.0, "original_max_position_embeddings": 512}
    merge_well("--adapter", adapter, "--output", tmp_path / "merged")
    check_config(tmp_path / "merged")
    used = load_for_inference(load_checkpoint(str(base)), str(adapter))
    scaled = shutil.copytree(base, tmp_path / "scaled")
    change_json(scaled / "config.json", rope_scaling=SETTINGS, rope_theta=5e5, rope_parameters=None)
    assert torch.equal(logits_of(load_for_inference(load_checkpoint(str(scaled)), str(adapter))), logits_of(used))
    change_json(scaled / "config.json", rope_scaling=SETTINGS | {"factor": 2.0})
    with pytest.raises(ConfigError, match=r"YaRN, factor 4 cannot be applied: config.json scales"):
        load_for_inference(load_checkpoint(str(scaled)), str(adapter))
    refused = merge("--adapter", adapter, "--base", scaled, "--output", tmp_path / "refused")
    assert "config.json scales the rotary embeddings already" in message_of(refused)
    assert used.config.max_position_embeddings == 2048
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits_of(used), logits_of(merged), atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigError, match=r"was trained with YaRN, factor 4, this run has YaRN, factor 8.*Give --rope"):
        run(base, tmp_path / "more", "--use_lora", "--lora_weight_path", adapter, "--rope_factor", 8)


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        (("--model_max_length", 1200), "--model_max_length 1200 exceeds the 512 positions of .* Give 512 or less, or "
         "extend them with --rope_scaling yarn --rope_factor 3"),
        ((*FLAGS, "--model_max_length", 2049), "2049 exceeds the 2048 positions .* --rope_factor 5"),
        (("--rope_factor", 4), "--rope_factor 4 has no effect without --rope_scaling"),
        (("--rope_scaling", "yarn"), "--rope_scaling yarn needs a factor"),
        (("--rope_scaling", "yarn", "--rope_factor", 1), "--rope_factor 1 is out of range"),
        ((*FLAGS, "--rope_original_length", 0), "--rope_original_length 0 is out of range"),
    ],
)  # fmt: skip
def test_faulty_flags_are_refused(base: Path, tmp_path: Path, flags: tuple[object, ...], fault: str) -> None:
    data = write_conversations(tmp_path / "data.json")
    with pytest.raises(ConfigError, match=fault):
        finetune_here("--model_name_or_path", base, "--data_path", data, "--output_dir", tmp_path / "out", *flags)


def test_scaled_base_is_not_scaled_again(tmp_path: Path) -> None:
    base = write_later_checkpoint(tmp_path / "base", "qwen2", CHATML_TEMPLATE)
    change_json(base / "config.json", rope_scaling=SETTINGS, rope_parameters=None)
    data = write_conversations(tmp_path / "data.json")
    with pytest.raises(ConfigError, match=r"--rope_scaling yarn: config.json scales the rotary embeddings already"):
        finetune_here("--model_name_or_path", base, "--data_path", data, "--output_dir", tmp_path / "out", *FLAGS)
