"""The commands that every command prints for the folder that it wrote."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from checkpoints.opening import opening_commands
from tests.golden import REPO


@pytest.mark.parametrize("model_type", ["qwen", "qwen2", "qwen3"])
def test_commands_name_the_folder_and_what_they_need(model_type: str) -> None:
    commands = opening_commands(Path("my models/it's"), {"model_type": model_type})
    words = {name: shlex.split(command) for name, command in commands.items()}
    assert list(words) == (["ask", "convert"] if model_type == "qwen" else ["ask", "serve", "convert"])
    assert all("my models/it's" in each for each in words.values())
    assert all(words[name][:2] == ["pip", "install"] and "&&" in words[name] for name in words if name != "ask")


def test_quantised_weights_are_not_converted_for_llama_cpp() -> None:
    config = {"model_type": "qwen2", "quantization_config": {"quant_method": "gptq"}}
    assert list(opening_commands("out", config)) == ["ask", "serve"]


def test_no_command_is_named_that_was_not_tried() -> None:
    """docs/export.md has a row, with versions, for each program."""
    table = (REPO / "docs" / "export.md").read_text()
    for program in ("scripts.ask", "transformers serve", "convert_hf_to_gguf.py"):
        assert f"| `{program}" in table
    assert opening_commands("out", {"model_type": "llama"}) == {}
