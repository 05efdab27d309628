"""Commands that open a written checkpoint: only those that were tried, which docs/export.md lists with versions.

Needs no torch.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_model.architectures import ARCHITECTURES

_SERVE = 'pip install "transformers[serving]" && transformers serve'
_CONVERT = (
    "pip install -r llama.cpp/requirements/requirements-convert_hf_to_gguf.txt && "
    "python llama.cpp/convert_hf_to_gguf.py"
)


def opening_commands(
    folder: str | Path, config: Mapping[str, Any], ask_command: str = "python -m scripts.ask"
) -> dict[str, str]:
    """Return shell commands that open a checkpoint's folder, with the installation that each needs, by what they do.

    Args:
        folder: the folder's name in the commands.
        config: its config.json; there are none for families that this toolkit cannot load.
        ask_command: how the reader starts ``scripts.ask``.
    """
    name, model_type = shlex.quote(str(folder)), config.get("model_type")
    if model_type not in ARCHITECTURES:
        return {}
    commands = {"ask": f'{ask_command} --model_name_or_path {name} "Who are you?"'}
    if model_type != "qwen":  # it looks for the class among transformers' own
        commands["serve"] = f"{_SERVE} {name}"
    if not config.get("quantization_config"):
        commands["convert"] = f"{_CONVERT} {name} --outfile model.gguf"
    return commands
