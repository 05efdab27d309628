"""Remote code of an exported Qwen v1 folder: the modules of ``qwen_model`` that define its classes, and their imports.

``auto_map`` in the configs names the classes, and transformers runs them with ``trust_remote_code=True``. After
``register_qwen()`` the toolkit's own classes take precedence, and no code in the folder is run.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import chat
import errors
import qwen_model
from checkpoints.files import load_json, save_json, save_text

# vLLM loads the classes in this order, and a model needs its config first.
_MODEL_CLASSES = {
    "AutoConfig": "configuration_qwen.QWenConfig",
    "AutoModel": "modeling_qwen.QWenModel",
    "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
}
_TOKENIZER_CLASS = "tokenization_qwen.QWenTokenizer"
_PACKAGES = ("errors", "chat", "qwen_model")
_NOTICE = "# SPDX-License-Identifier: Apache-2.0\n# From the Qwen fine-tuning toolkit, with relative imports.\n"

# Folder of the sources, by the prefix of a module's full name.
_SOURCES = {
    "chat.": Path(chat.__file__).parent,
    "qwen_model.": Path(qwen_model.__file__).parent,
    "": Path(errors.__file__).parent,
}


def write_code(folder: Path) -> list[Path]:
    """Write the code of Qwen v1 into a checkpoint folder and name its classes in ``auto_map`` of the configs.

    The tokenizer of that code recognises control tokens in texts, because servers pass the rendered prompt as one text.

    Args:
        folder: contains ``config.json`` of Qwen v1; ``tokenizer_config.json`` is created if it is missing.

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
        written.append(folder / f"{_flat_name(name)}.py")
        save_text(_NOTICE + with_relative_imports(_source(name)), written[-1])
    # llama.cpp's converter reads the norms' epsilon under this name; without it, llama.cpp refuses the model.
    epsilon = {"rms_norm_eps": config["layer_norm_epsilon"]} if "layer_norm_epsilon" in config else {}
    save_json(config | epsilon | {"auto_map": _MODEL_CLASSES}, folder / "config.json")
    tokenizer_settings = {
        "tokenizer_class": _TOKENIZER_CLASS.rpartition(".")[2],
        "auto_map": {"AutoTokenizer": [_TOKENIZER_CLASS, None]},
        "split_special_tokens": False,
    }
    save_json(tokenizer_config | tokenizer_settings, tokenizer_file)
    return written


def code_modules() -> list[str]:
    """Return the modules that define the classes and all modules of the toolkit that these import, sorted by name."""
    classes = (*_MODEL_CLASSES.values(), _TOKENIZER_CLASS)
    pending = {f"qwen_model.{name.partition('.')[0]}" for name in classes}
    modules: set[str] = set()
    while pending:
        name = pending.pop()
        modules.add(name)
        pending |= {str(node.module) for node in _toolkit_imports(_source(name))} - modules
    return sorted(modules)


def with_relative_imports(source: str) -> str:
    """Rewrite ``from qwen_model.x import`` and ``from errors import`` in a module's source as ``from .x import``."""
    lines = source.splitlines(keepends=True)
    for node in _toolkit_imports(source):
        # ast counts columns in bytes; only blanks precede a statement.
        line, begin = lines[node.lineno - 1], node.col_offset
        old = f"from {node.module} import"
        assert line.startswith(old, begin), f"line {node.lineno}: write it as {old!r}"
        new = f"from .{_flat_name(str(node.module))} import"
        lines[node.lineno - 1] = line[:begin] + new + line[begin + len(old) :]
    return "".join(lines)


def _toolkit_imports(source: str) -> Iterator[ast.ImportFrom]:
    """Yield every import of a module of the toolkit, also within functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            if (node.module or "").partition(".")[0] in _PACKAGES:
                yield node
        elif isinstance(node, ast.Import):
            absolute = [alias.name for alias in node.names if alias.name.partition(".")[0] in _PACKAGES]
            assert not absolute, f"line {node.lineno}: has no relative form, write from {absolute[0]} import ..."


def _flat_name(module: str) -> str:
    return module.rpartition(".")[2]


def _source(module: str) -> str:
    prefix = next(prefix for prefix in _SOURCES if module.startswith(prefix))
    return (_SOURCES[prefix] / f"{module.removeprefix(prefix)}.py").read_text(encoding="utf-8")
