"""What a merge tells its user: once, in words that are true where they are read, and only what the folder can do."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.bases import write_published
from tests.merging import merge, merge_well, message_of
from tests.models import change_json, copy_checkpoint
from tests.verification import make_adapter

SAMPLE = {"source": "a.json:1", "ids": [5, 6, 7], "labels": [-100, 6, 7]}
SAMPLES = "training_samples.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("made")
    base = write_published(folder / "base")
    return base, make_adapter(base, folder / "adapter")


@pytest.fixture
def base(made: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[0], tmp_path / "base"))


@pytest.fixture
def adapter(made: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[1], tmp_path / "run" / "checkpoint-7"))


def test_a_limit_of_the_layout_is_said_once(tmp_path: Path) -> None:
    base = copy_checkpoint(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter")
    result = merge_well("--adapter", adapter, "--output", tmp_path / "out", "--layout", "qwen2", "--dtype", "bf16")
    assert result.stderr.count("Qwen2 has no dynamic NTK") == 1


def test_an_adapter_that_changes_nothing_is_said(base: Path, adapter: Path, tmp_path: Path) -> None:
    same = shutil.copytree(adapter, tmp_path / "same")
    for arguments in ([f"{adapter}=0"], [adapter, f"{same}=-1"]):
        output = tmp_path / f"out{len(arguments)}"
        result = merge_well("--adapter", *arguments, "--base", base, "--output", output, "--dtype", "fp32")
        assert "0 of 27 tensors changed" in result.stdout and "WARNING No weight changed" in result.stderr
    result = merge_well("--adapter", adapter, f"{same}=-0.5", "--base", base, "--output", tmp_path / "half")
    assert "14 of 27 tensors changed" in result.stdout and "WARNING" not in result.stderr


@pytest.mark.parametrize("place", ["adapter", "run"])
@pytest.mark.parametrize("fault", ["text", "version", "pipe"])
def test_faulty_training_samples_are_refused_with_the_remedy(
    base: Path, adapter: Path, tmp_path: Path, place: str, fault: str
) -> None:
    """Also those of the run that a checkpoint belongs to, before anything is written."""
    path = (adapter if place == "adapter" else adapter.parent) / SAMPLES
    if fault == "pipe":
        os.mkfifo(path)
    else:
        path.write_text("{nope" if fault == "text" else json.dumps({"version": 2, "samples": [SAMPLE]}))
    result = merge("--adapter", adapter, "--base", base, "--output", tmp_path / "out")
    assert result.returncode == 2 and str(path) in message_of(result) and not (tmp_path / "out").exists()
    assert ("named pipe" if fault == "pipe" else "Remove it: a merge is then compared on") in message_of(result)


def test_messages_name_no_temporary_folder_and_no_command_that_cannot_work(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    output = tmp_path / "named"
    result = merge_well("--adapter", adapter, "--base", base, "--output", output)
    assert f"the tokenizer of {output} cannot be used" in result.stderr and ".partial" not in result.stderr
    assert "next:" not in result.stdout

    shutil.rmtree(base / "additional_chat_templates")
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (base / name).unlink()
    output = tmp_path / "without"
    result = merge_well("--adapter", adapter, "--base", base, "--output", output)
    assert f"the tokenizer of {output} cannot be used (it has no files)" in result.stderr
    assert ".partial" not in result.stderr and "next:" not in result.stdout
    assert "```bash" not in (output / "README.md").read_text()


def test_a_published_card_has_no_command_of_this_machine(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (adapter / "base_quantization.json").write_text(json.dumps(settings))
    find = importlib.util.find_spec

    def find_others(name: str, *arguments: Any) -> Any:
        return None if name == "bitsandbytes" else find(name, *arguments)

    monkeypatch.setattr(importlib.util, "find_spec", find_others)
    result = merge_well("--adapter", adapter, "--base", base, "--output", tmp_path / "out")
    [line] = [line for line in (tmp_path / "out" / "README.md").read_text().splitlines() if "not measured" in line]
    assert "(not measured: bitsandbytes was not installed)" in line
    assert "which is not installed. Install it: " in result.stderr and "pip install -r" in result.stderr


def test_a_model_for_single_tokens_has_no_answers_to_compare(base: Path, adapter: Path, tmp_path: Path) -> None:
    (adapter / SAMPLES).write_text(json.dumps({"version": 1, "samples": [SAMPLE]}))
    change_json(base / "config.json", max_position_embeddings=1)
    result = merge_well("--adapter", adapter, "--base", base, "--output", tmp_path / "out")
    assert "no answers compared" in result.stdout and "nan" not in result.stdout + result.stderr


@pytest.mark.parametrize("weight", ["1e38", "-2e6"])
def test_a_weight_beyond_all_use_is_refused(adapter: Path, tmp_path: Path, weight: str) -> None:
    result = merge("--adapter", f"{adapter}={weight}", "--output", tmp_path / "out")
    assert f"'{weight}' is not a weight. Write a number of at most 1,000,000" in message_of(result)
