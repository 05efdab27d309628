"""After register_qwen() transformers' Auto classes use ours for Qwen v1 and never run a folder's code."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from qwen_model.configuration_qwen import QWenConfig
from qwen_model.modeling_qwen import QWenLMHeadModel, QWenModel
from qwen_model.register import register_qwen
from qwen_model.tokenization_qwen import QWenTokenizer
from tests.golden import SMALL, assert_logits
from tests.golden import GoldenTensors as Tensors

CODE_FILES = ("configuration_qwen.py", "modeling_qwen.py", "tokenization_qwen.py", "qwen_generation_utils.py")


@pytest.fixture(autouse=True)
def registered() -> None:
    register_qwen()


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A file that the folder's code would create."""
    return tmp_path / "the-code-ran"


@pytest.fixture
def hostile_folder(tmp_path: Path, marker: Path) -> Path:
    """A checkpoint as published, with auto_map in its configs and code that would create the marker."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(SMALL / "tiny-qwen-small", folder)
    assert "auto_map" in (folder / "config.json").read_text()
    assert "auto_map" in (folder / "tokenizer_config.json").read_text()
    code = f"open({str(marker)!r}, 'w').close()\nclass QWenConfig: pass\nclass QWenLMHeadModel: pass\n"
    for name in CODE_FILES:
        (folder / name).write_text(code + "class QWenTokenizer: pass\n")
    return folder


@torch.no_grad()
@pytest.mark.parametrize("arguments", [{}, {"trust_remote_code": False}], ids=str)
def test_code_of_a_folder_never_runs(hostile_folder: Path, marker: Path, arguments: dict[str, Any]) -> None:
    config = AutoConfig.from_pretrained(hostile_folder, **arguments)
    tokenizer = AutoTokenizer.from_pretrained(hostile_folder, **arguments)
    model = AutoModelForCausalLM.from_pretrained(hostile_folder, dtype=torch.float32, **arguments)
    base = AutoModel.from_pretrained(hostile_folder, dtype=torch.float32, **arguments)
    assert (type(config), type(tokenizer)) == (QWenConfig, QWenTokenizer)
    assert (type(model), type(base)) == (QWenLMHeadModel, QWenModel)
    tensors = Tensors(SMALL / "logits.safetensors")
    assert_logits(model.eval()(input_ids=tensors.ids("A.input_ids")).logits, tensors, "A.eval")
    assert not marker.exists()
    # Negative control: running the code creates the marker.
    exec((hostile_folder / "modeling_qwen.py").read_text())
    assert marker.exists()


def test_registered_classes_take_precedence_over_trusted_code(hostile_folder: Path, marker: Path) -> None:
    """Even with trust_remote_code. (transformers' AutoTokenizer would run the folder's code.)"""
    trusting = {"trust_remote_code": True}
    assert type(AutoConfig.from_pretrained(hostile_folder, **trusting)) is QWenConfig
    assert type(AutoModelForCausalLM.from_pretrained(hostile_folder, **trusting)) is QWenLMHeadModel
    assert not marker.exists()


def test_folders_without_auto_map_or_tokenizer_class(tmp_path: Path) -> None:
    """model_type is sufficient."""
    for name in ("config.json", "model.safetensors", "qwen.tiktoken"):
        shutil.copy(SMALL / "tiny-qwen-small" / name, tmp_path)
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is QWenTokenizer
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is QWenLMHeadModel


def test_saved_folders_load_without_code(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(SMALL / "tiny-qwen-small")
    model = AutoModelForCausalLM.from_pretrained(SMALL / "tiny-qwen-small")
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is QWenTokenizer
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is QWenLMHeadModel


def test_repeated_registration_has_no_effect() -> None:
    register_qwen()
    register_qwen()
    assert type(AutoConfig.for_model("qwen")) is QWenConfig
    assert type(AutoTokenizer.from_pretrained(SMALL / "tiny-qwen-small")) is QWenTokenizer


def test_later_families_keep_their_classes() -> None:
    for model_type, name in (("qwen2", "Qwen2Config"), ("qwen3", "Qwen3Config")):
        config = AutoConfig.for_model(model_type)
        assert type(config).__name__ == name
        assert sys.modules[type(config).__module__].__name__.startswith("transformers.")
