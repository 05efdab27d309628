"""The commands that every command prints for the folder that it wrote."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from loading.opened_by import opening_commands
from tests.bases import write_published, write_with_foreign_tokenizer
from tests.golden import REPO


@pytest.mark.parametrize("model_type", ["qwen", "qwen2", "qwen3"])
def test_commands_name_the_folder_and_come_after_their_installation(model_type: str) -> None:
    commands = opening_commands(Path("my models/it's"), {"model_type": model_type})
    assert list(commands) == (["ask", "convert"] if model_type == "qwen" else ["ask", "serve", "convert"])
    for name, lines in commands.items():
        *installation, last = map(shlex.split, lines)
        assert "my models/it's" in last
        assert name == "ask" or any("install" in words for words in installation)


@pytest.mark.parametrize(("method", "is_converted"), [("gptq", True), ("awq", False), ("bitsandbytes", False)])
def test_quantised_weights_that_llama_cpp_cannot_read_are_not_converted(method: str, is_converted: bool) -> None:
    config = {"model_type": "qwen2", "quantization_config": {"quant_method": method}}
    assert ("convert" in opening_commands(Path("out"), config)) == is_converted


def test_a_tokenizer_that_transformers_changes_is_not_served_by_it(tmp_path: Path) -> None:
    config = {"model_type": "qwen2"}
    assert list(opening_commands(write_published(tmp_path / "qwen"), config)) == ["ask", "serve", "convert"]
    assert list(opening_commands(write_with_foreign_tokenizer(tmp_path / "foreign"), config)) == ["ask", "convert"]


def test_no_command_is_named_that_was_not_tried() -> None:
    """docs/export.md has a row, with versions, for each program."""
    table = (REPO / "docs" / "export.md").read_text()
    for program in ("scripts.ask", "transformers serve", "convert_hf_to_gguf.py"):
        assert f"| `{program}" in table
    assert opening_commands(Path("out"), {"model_type": "llama"}) == {}
