"""The code of an exported Qwen v1 folder, and the toolkit's precedence over it."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from errors import ConfigError
from export.standalone import code_modules, with_relative_imports, write_code
from loading.checkpoint import load_checkpoint
from qwen_model.configuration_qwen import QWenConfig
from qwen_model.modeling_qwen import QWenLMHeadModel
from qwen_model.register import register_qwen
from qwen_model.tokenization_qwen import QWenTokenizer
from tests.golden import REPO
from tests.models import copy_checkpoint

register_qwen()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Qwen v1 checkpoint that contains its code."""
    copy_checkpoint(tmp_path / "exported")
    write_code(tmp_path / "exported")
    return tmp_path / "exported"


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def imports(source: str) -> set[tuple[int, str]]:
    """Level and module of every import in a source."""
    nodes = list(ast.walk(ast.parse(source)))
    plain = {(0, alias.name) for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {(node.level, node.module or "") for node in nodes if isinstance(node, ast.ImportFrom)}


def test_code_imports_only_itself_and_libraries(folder: Path) -> None:
    files = {path.stem: path for path in folder.glob("*.py")}
    assert {"modeling_qwen", "configuration_qwen", "tokenization_qwen", "errors"} <= files.keys()
    ours = {path.stem for path in [*REPO.glob("*.py"), *REPO.glob("*/__init__.py")]} | {"qwen_model"}
    for path in files.values():
        for level, module in imports(path.read_text(encoding="utf-8")):
            assert level <= 1 and (level == 0 or module in files), (path.name, module)
            assert level == 1 or module.split(".")[0] not in ours, (path.name, module)


def test_only_imported_modules_are_written(folder: Path) -> None:
    imported = {module for path in folder.glob("*.py") for level, module in imports(path.read_text()) if level}
    classes = {"modeling_qwen", "configuration_qwen", "tokenization_qwen"}
    assert {path.stem for path in folder.glob("*.py")} == imported | classes
    assert len(list(folder.glob("*.py"))) == len(code_modules())


def test_code_is_only_what_the_model_needs(folder: Path) -> None:
    """Tools, thinking, chat detection and the lean loss stay in the toolkit."""
    assert sum(len(path.read_text().splitlines()) for path in folder.glob("*.py")) <= 2100


def test_only_import_lines_differ_from_the_source(folder: Path) -> None:
    for path in folder.glob("*.py"):
        source = next(
            REPO / folder / path.name for folder in ("", "chat", "qwen_model") if (REPO / folder / path.name).is_file()
        )
        notice, lines = path.read_text().splitlines()[:2], path.read_text().splitlines()[2:]
        assert notice[0] == "# SPDX-License-Identifier: Apache-2.0" and notice[1].startswith("# From the Qwen")
        old = source.read_text().splitlines()
        assert len(lines) == len(old)
        for before, after in zip(old, lines, strict=True):
            if before != after:
                changed = (
                    before.replace("from qwen_model.", "from .")
                    .replace("from chat.", "from .")
                    .replace("from errors import", "from .errors import")
                )
                assert after == changed


def test_imports_at_any_level_are_made_relative() -> None:
    source = (
        '"""from errors import x"""\nfrom errors import (\n    A,\n)\nif True:\n    from qwen_model.rope import b\n'
    )
    source += 'def f():\n\t"é"; x = 1\n\tfrom chat.render import c as d\n\timport torch\n'
    expected = (
        source.replace("from errors import (", "from .errors import (")
        .replace("from qwen_model.", "from .")
        .replace("from chat.", "from .")
    )
    assert with_relative_imports(source) == expected
    for unsupported in ("import errors", "import os, qwen_model.rope", "x = 1; from errors  import A"):
        with pytest.raises(AssertionError):
            with_relative_imports(unsupported)


def test_configs_name_the_classes(folder: Path) -> None:
    auto_map = read(folder / "config.json")["auto_map"]
    # vLLM loads them in this order, and a model needs its config first.
    assert list(auto_map) == ["AutoConfig", "AutoModel", "AutoModelForCausalLM"]
    named = [*auto_map.values(), read(folder / "tokenizer_config.json")["auto_map"]["AutoTokenizer"][0]]
    for name in named:
        module, _, class_ = name.partition(".")
        tree = ast.parse((folder / f"{module}.py").read_text())
        assert class_ in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def test_other_config_values_are_unchanged(folder: Path, tmp_path: Path) -> None:
    plain = copy_checkpoint(tmp_path / "plain")
    before, after = read(plain / "config.json"), read(folder / "config.json")
    assert after.pop("rms_norm_eps") == before["layer_norm_epsilon"], "llama.cpp's converter looks for it"
    del before["auto_map"], after["auto_map"]
    assert after == before
    before, after = read(plain / "tokenizer_config.json"), read(folder / "tokenizer_config.json")
    assert after == before | {"split_special_tokens": False}


def test_missing_tokenizer_config_is_created(tmp_path: Path) -> None:
    folder = copy_checkpoint(tmp_path / "exported")
    (folder / "tokenizer_config.json").unlink()
    write_code(folder)
    assert read(folder / "tokenizer_config.json")["tokenizer_class"] == "QWenTokenizer"


def test_broken_config_is_named_in_the_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is not JSON"):
        write_code(tmp_path)


def test_toolkit_opens_the_folder_with_its_own_classes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No code of the folder is run, and the user is not asked for permission."""
    for path in folder.glob("*.py"):
        path.write_text(f"raise AssertionError('{path.name} was run')\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked for permission to run the folder's code"))
    checkpoint = load_checkpoint(str(folder))
    assert type(checkpoint.config) is QWenConfig and type(checkpoint.tokenizer) is QWenTokenizer
    model = QWenLMHeadModel.from_pretrained(folder, dtype=torch.float32)
    assert type(model.config) is QWenConfig


def test_folders_saved_by_the_toolkit_name_no_code(folder: Path, tmp_path: Path) -> None:
    AutoConfig.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert "auto_map" not in read(tmp_path / "again" / "config.json")
    load_checkpoint(str(folder)).tokenizer.save_pretrained(tmp_path / "again")
    assert "auto_map" not in read(tmp_path / "again" / "tokenizer_config.json")
