"""The commands that every command prints for the folder that it wrote."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from loading.opened_by import opening_commands
from tests.bases import write_published, write_with_foreign_tokenizer
from tests.golden import REPO


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a vocabulary and a chat template, by a relative name."""
    monkeypatch.chdir(tmp_path)
    path = Path("my models/it's")
    path.mkdir(parents=True)
    (path / "vocab.json").write_text("{}")
    (path / "chat_template.jinja").write_text("{{ messages }}")
    return path


@pytest.mark.parametrize("model_type", ["qwen", "qwen2", "qwen3"])
def test_commands_name_the_folder_and_come_after_their_installation(folder: Path, model_type: str) -> None:
    commands = opening_commands(folder, {"model_type": model_type})
    assert list(commands) == (["ask", "vllm", "gguf"] if model_type == "qwen" else ["ask", "serve", "vllm", "gguf"])
    for name, lines in commands.items():
        *installation, last = map(shlex.split, lines)
        assert any(word.startswith("my models/it's") for word in last)
        assert name in ("ask", "gguf") or any("install" in words for words in installation)


@pytest.mark.parametrize("model_type", ["qwen", "qwen2"])
def test_vllm_serves_what_was_converted_to_the_layout_that_it_knows(folder: Path, model_type: str) -> None:
    first, *_, serve = map(shlex.split, opening_commands(folder, {"model_type": model_type})["vllm"])
    served = f"{folder}-qwen2" if model_type == "qwen" else str(folder)
    assert serve[-2:] == ["serve", served]
    is_converted = first[-4:] == [str(folder), served, "--layout", "qwen2"]
    assert is_converted == (model_type == "qwen")


@pytest.mark.parametrize(
    ("quantization", "is_served"),
    [
        ({"quant_method": "awq"}, True),
        ({"quant_method": "gptq", "sym": True}, True),
        ({"quant_method": "gptq", "sym": False}, False),
        ({"quant_method": "bitsandbytes"}, False),
    ],
)
def test_weights_that_vllm_refuses_are_not_served_by_it(
    folder: Path, quantization: dict[str, object], is_served: bool
) -> None:
    config = {"model_type": "qwen2", "quantization_config": quantization}
    assert ("vllm" in opening_commands(folder, config)) == is_served


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_quantised_weights_are_not_exported_to_llama_cpp(folder: Path, method: str) -> None:
    config = {"model_type": "qwen2", "quantization_config": {"quant_method": method}}
    assert "gguf" not in opening_commands(folder, config)


@pytest.mark.parametrize(("model_type", "is_asked"), [("qwen", True), ("qwen2", True), ("qwen3", False)])
def test_without_a_template_only_families_of_a_known_format_are_asked(
    folder: Path, model_type: str, is_asked: bool
) -> None:
    (folder / "chat_template.jinja").unlink()
    assert ("ask" in opening_commands(folder, {"model_type": model_type})) == is_asked


@pytest.mark.parametrize(("names", "is_asked"), [(["tools"], False), (["default", "tools"], True)])
def test_named_templates_without_a_default_one_are_not_asked(folder: Path, names: list[str], is_asked: bool) -> None:
    (folder / "chat_template.jinja").unlink()
    inline = [{"name": name, "template": "{{ messages }}"} for name in names]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": inline}))
    assert ("ask" in opening_commands(folder, {"model_type": "qwen2"})) == is_asked
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    assert opening_commands(folder, {"model_type": "qwen2"}) == {}


def test_a_folder_without_a_tokenizer_is_opened_by_nothing(folder: Path) -> None:
    (folder / "vocab.json").unlink()
    assert opening_commands(folder, {"model_type": "qwen2"}) == {}


def test_a_tokenizer_that_transformers_changes_is_not_served_by_it(tmp_path: Path) -> None:
    config = {"model_type": "qwen2"}
    assert list(opening_commands(write_published(tmp_path / "qwen"), config)) == ["ask", "serve", "vllm", "gguf"]
    assert list(opening_commands(write_with_foreign_tokenizer(tmp_path / "foreign"), config)) == ["ask", "gguf"]


def test_no_command_is_named_that_was_not_tried(folder: Path) -> None:
    """docs/export.md has a row, with versions, for each program."""
    table = (REPO / "docs" / "export.md").read_text()
    for program in ("scripts.ask", "transformers serve", "vllm serve", "scripts.export_gguf"):
        assert f"| `{program}" in table
    assert opening_commands(folder, {"model_type": "llama"}) == {}
