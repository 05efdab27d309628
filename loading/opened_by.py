"""Commands that open a written checkpoint: only those that were tried, which docs/export.md lists with versions."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoints.companions import has_tokenizer
from checkpoints.files import load_json_or_empty
from checkpoints.names import TEMPLATES_FOLDER
from console import python_command, shown_path
from loading.tokenizer import is_rebuilt_otherwise
from qwen_model.architectures import ARCHITECTURES, TEXT_TYPES

Commands = dict[str, list[str]]
"""Shell commands by what they do: ``ask``, ``serve``, ``vllm``, ``gguf``; each after what it needs."""


def opening_commands(folder: Path, config: Mapping[str, Any], prompt_flags: Sequence[str] = ()) -> Commands:
    """Return the commands that open a checkpoint's folder, for the user who wrote it.

    Args:
        config: its config.json; there are no commands for families that this toolkit cannot load, and without a
            tokenizer.
        prompt_flags: words for a shell, flags of scripts.ask with which its prompts are those of training.
    """
    python = shlex.quote(shown_path(Path(sys.executable)))
    return _commands(folder, config, str(folder), python, python_command, prompt_flags)


def published_commands(folder: Path, config: Mapping[str, Any]) -> Commands:
    """Return the commands for a reader with another machine; they call the folder FOLDER."""
    return _commands(folder, config, "FOLDER", "python", lambda module: f"python {module}")


def opening_lines(folder: Path, config: Mapping[str, Any]) -> str:
    """Return the commands as the end of a command's output; empty if there are none."""
    lines = [line for lines in opening_commands(folder, config).values() for line in lines]
    return "\n  ".join(["next:", *lines]) if lines else ""


def _commands(
    folder: Path,
    config: Mapping[str, Any],
    path: str,
    python: str,
    in_checkout: Callable[[str], str],
    prompt_flags: Sequence[str] = (),
) -> Commands:
    """Return the commands.

    Args:
        path: what they call the folder.
        in_checkout: makes a command of this toolkit from what follows ``python``.
    """
    model_type = TEXT_TYPES.get(str(config.get("model_type")), config.get("model_type"))
    if model_type not in ARCHITECTURES or not has_tokenizer(folder):
        return {}
    name, quantization = shlex.quote(path), config.get("quantization_config") or {}
    method = quantization.get("quant_method")
    commands = {}
    if is_prompted := _has_default_template(folder, str(model_type)):
        question = " ".join([*prompt_flags, '"Who are you?"'])
        commands["ask"] = [f"{in_checkout('-m scripts.ask')} --model_name_or_path {name} {question}"]
    if model_type in TEXT_TYPES.values():  # with other programs it was not tried
        return commands
    # Both know only the classes within themselves, and take the tokenizer's class that transformers chooses.
    if is_prompted and not is_rebuilt_otherwise(folder, config):
        if model_type != "qwen":
            install = f'{python} -m pip install "transformers[serving]"'
            commands["serve"] = [install, f"{python} -m transformers.cli.transformers serve {name}"]
        if method in (None, "awq") or (method == "gptq" and quantization.get("sym")):  # it refuses zero points of GPTQ
            commands["vllm"] = _vllm_commands(path, str(model_type), python, in_checkout)
    if is_prompted and method is None:  # it says itself what has to be installed
        commands["gguf"] = [f"{in_checkout('-m scripts.export_gguf')} {name} --outfile model.gguf"]
    return commands


def _vllm_commands(path: str, model_type: str, python: str, in_checkout: Callable[[str], str]) -> list[str]:
    """Return the commands that serve a folder; vLLM refuses Qwen v1's layout, so that one is converted first."""
    name, served = shlex.quote(path), shlex.quote(f"{path}-qwen2" if model_type == "qwen" else path)
    convert = f"{in_checkout('-m scripts.convert_layout')} {name} {served} --layout qwen2"
    serve = [f"{python} -m venv .venv-vllm && .venv-vllm/bin/pip install vllm", f".venv-vllm/bin/vllm serve {served}"]
    return [convert, *serve] if model_type == "qwen" else serve


def _has_default_template(folder: Path, model_type: str) -> bool:
    """Return whether conversations have a format: a template for those without tools, or one of the family."""
    architecture = ARCHITECTURES[model_type]
    if not architecture.brings_chat_template or (folder / "chat_template.jinja").is_file():
        return True
    if named := [path.stem for path in (folder / TEMPLATES_FOLDER).glob("*.jinja")]:
        return "default" in named  # transformers then ignores those of tokenizer_config.json
    inline = load_json_or_empty(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(inline, list):
        return any(template.get("name") == "default" for template in inline)
    return bool(inline) or architecture.base_system is not None
