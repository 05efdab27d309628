"""After register_qwen() transformers' Auto classes use ours for Qwen v1 and never run a folder's code."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

from qwen_model.configuration_qwen import QWenConfig
from qwen_model.modeling_qwen import QWenLMHeadModel, QWenModel
from qwen_model.register import register_qwen
from qwen_model.tokenization_qwen import QWenTokenizer
from tests.golden import SMALL, assert_logits
from tests.golden import GoldenTensors as Tensors
from tests.models import change_json

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


TRUSTING = {"trust_remote_code": True}


@torch.no_grad()
@pytest.mark.parametrize("arguments", [{}, {"trust_remote_code": False}, TRUSTING], ids=str)
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


def without_tokenizer_class(folder: Path) -> None:
    change_json(folder / "tokenizer_config.json", tokenizer_class=None)
    change_json(folder / "config.json", tokenizer_class=None)


def with_other_class(folder: Path) -> None:
    auto_map = {"AutoTokenizer": ["tokenization_qwen.Evil", "tokenization_qwen.Evil"]}
    change_json(folder / "tokenizer_config.json", tokenizer_class="Evil", auto_map=auto_map)
    change_json(folder / "config.json", tokenizer_class="Evil", auto_map=auto_map)


def with_old_auto_map(folder: Path) -> None:
    change_json(folder / "tokenizer_config.json", auto_map=["tokenization_qwen.QWenTokenizer", None])


def with_code_of_another_repository(folder: Path) -> None:
    auto_map = {name: f"someone/else--modeling_qwen.{name}" for name in ("AutoConfig", "AutoModel")}
    change_json(folder / "config.json", auto_map=auto_map)
    change_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["someone/else--x.Evil", None]})


def with_custom_generate(folder: Path) -> None:
    (folder / "custom_generate").mkdir()
    shutil.copy(folder / "modeling_qwen.py", folder / "custom_generate" / "generate.py")


def with_custom_pipeline(folder: Path) -> None:
    custom = {"text-generation": {"impl": "modeling_qwen.Evil", "pt": ["AutoModelForCausalLM"]}}
    change_json(folder / "config.json", custom_pipelines=custom)


def with_foreign_attention(folder: Path) -> None:
    change_json(folder / "config.json", attn_implementation="someone/kernel", _attn_implementation="someone/kernel")


@pytest.mark.parametrize(
    "change",
    [
        without_tokenizer_class, with_other_class, with_old_auto_map, with_code_of_another_repository,
        with_custom_generate, with_custom_pipeline, with_foreign_attention,
    ],
    ids=lambda change: change.__name__,
)  # fmt: skip
def test_no_way_of_naming_code_makes_it_run(hostile_folder: Path, marker: Path, change: Callable[[Path], None]) -> None:
    change(hostile_folder)
    writer = pipeline("text-generation", model=str(hostile_folder), **TRUSTING)
    assert type(AutoTokenizer.from_pretrained(hostile_folder, **TRUSTING)) is QWenTokenizer
    assert type(AutoTokenizer.from_pretrained(hostile_folder, config=writer.model.config, **TRUSTING)) is QWenTokenizer
    assert type(AutoModel.from_pretrained(hostile_folder, **TRUSTING)) is QWenModel
    assert (type(writer.model), type(writer.tokenizer)) == (QWenLMHeadModel, QWenTokenizer)
    assert writer.model.generate.__func__ is QWenLMHeadModel.generate  # type: ignore[attr-defined]
    assert writer.model.config._attn_implementation == "sdpa"
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
    before = AutoTokenizer.from_pretrained
    register_qwen()
    register_qwen()
    assert AutoTokenizer.from_pretrained is before
    assert type(AutoConfig.for_model("qwen")) is QWenConfig
    assert type(AutoTokenizer.from_pretrained(SMALL / "tiny-qwen-small")) is QWenTokenizer


def test_later_families_keep_their_classes() -> None:
    for model_type, name in (("qwen2", "Qwen2Config"), ("qwen3", "Qwen3Config")):
        config = AutoConfig.for_model(model_type)
        assert type(config).__name__ == name
        assert sys.modules[type(config).__module__].__name__.startswith("transformers.")
