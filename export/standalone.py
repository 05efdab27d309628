"""A Qwen v1 folder that opens without this toolkit: ``qwen_model`` lies in it as the checkpoint's own code.

transformers calls that remote code: ``auto_map`` in the configs names the classes, ``trust_remote_code=True`` runs
them. With ``register_qwen()`` the toolkit's classes go first, and nothing in the folder is run.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import chat
import errors
import qwen_model
from checkpoints.files import load_json, save_json, save_text

# In this order: vLLM loads the classes as they stand here, and a model needs its config first.
_MODEL_CLASSES = {
    "AutoConfig": "configuration_qwen.QWenConfig",
    "AutoModel": "modeling_qwen.QWenModel",
    "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
}
_TOKENIZER_CLASS = "tokenization_qwen.QWenTokenizer"
_OURS = ("errors", "chat", "qwen_model")
_NOTICE = "# SPDX-License-Identifier: Apache-2.0\n# From the Qwen fine-tuning toolkit, with relative imports.\n"

# The folders of what may go along, by the prefix of a module's name.
_SOURCES = {
    "chat.": Path(chat.__file__).parent,
    "qwen_model.": Path(qwen_model.__file__).parent,
    "": Path(errors.__file__).parent,
}


def write_code(folder: Path) -> list[Path]:
    """Write the code of Qwen v1 into a checkpoint folder, and its classes into ``auto_map`` of the configs.

    The tokenizer that is opened with that code reads control tokens in a text, as servers hand over whole prompts.

    Args:
        folder: holds ``config.json`` of Qwen v1; ``tokenizer_config.json`` is made where it is missing.

    Returns:
        The Python files.

    Raises:
        ConfigError: a config that cannot be read.
    """
    config = load_json(folder / "config.json")
    assert config.get("model_type") == "qwen", "other families need no code"
    tokenizer_file = folder / "tokenizer_config.json"
    tokenizer_config = load_json(tokenizer_file) if tokenizer_file.is_file() else {}
    written = []
    for name in code_modules():
        written.append(folder / f"{_flat(name)}.py")
        save_text(_NOTICE + with_relative_imports(_source(name)), written[-1])
    # llama.cpp's converter looks for the norms' epsilon under this name; without it its runner refuses the file.
    epsilon = {"rms_norm_eps": config["layer_norm_epsilon"]} if "layer_norm_epsilon" in config else {}
    save_json(config | epsilon | {"auto_map": _MODEL_CLASSES}, folder / "config.json")
    own = {
        "tokenizer_class": _TOKENIZER_CLASS.rpartition(".")[2],
        "auto_map": {"AutoTokenizer": [_TOKENIZER_CLASS, None]},
        "split_special_tokens": False,
    }
    save_json(tokenizer_config | own, tokenizer_file)
    return written


def code_modules() -> list[str]:
    """The modules that hold the classes, and all of ours that these import, in the order of their names."""
    classes = (*_MODEL_CLASSES.values(), _TOKENIZER_CLASS)
    waiting = {f"qwen_model.{name.partition('.')[0]}" for name in classes}
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        found.add(name)
        waiting |= {str(node.module) for node in _own_imports(_source(name))} - found
    return sorted(found)


def with_relative_imports(source: str) -> str:
    """A module's source with ``from qwen_model.x import`` and ``from errors import`` as ``from .x import``."""
    lines = source.splitlines(keepends=True)
    for node in _own_imports(source):
        # ast counts columns in bytes; what stands before a statement is blanks.
        line, begin = lines[node.lineno - 1], node.col_offset
        old = f"from {node.module} import"
        assert line.startswith(old, begin), f"line {node.lineno}: write it as {old!r}"
        new = f"from .{_flat(str(node.module))} import"
        lines[node.lineno - 1] = line[:begin] + new + line[begin + len(old) :]
    return "".join(lines)


def _own_imports(source: str) -> Iterator[ast.ImportFrom]:
    """Every import of a module of ours, also within functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            if (node.module or "").partition(".")[0] in _OURS:
                yield node
        elif isinstance(node, ast.Import):
            ours = [alias.name for alias in node.names if alias.name.partition(".")[0] in _OURS]
            assert not ours, f"line {node.lineno}: has no relative form, write from {ours[0]} import ..."


def _flat(module: str) -> str:
    return module.rpartition(".")[2]


def _source(module: str) -> str:
    prefix = next(prefix for prefix in _SOURCES if module.startswith(prefix))
    return (_SOURCES[prefix] / f"{module.removeprefix(prefix)}.py").read_text(encoding="utf-8")
