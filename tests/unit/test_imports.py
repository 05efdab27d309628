"""Who may import whom, and what no source of the project may do. Read from the sources, without running them."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.golden import REPO

# Imports point one way. Commands may import every package, and nothing imports a command.
PACKAGES = {
    "chat": {"errors"},
    "qwen_model": {"errors", "chat"},
    "data_utils": {"errors", "chat"},
    "checkpoints": {"errors", "qwen_model"},
    "loading": {"errors", "processes", "chat", "qwen_model", "checkpoints"},
    "training": {"errors", "processes", "commands", "chat", "qwen_model", "data_utils", "checkpoints", "loading"},
    "quantize": {"errors", "chat", "qwen_model", "data_utils", "checkpoints", "loading"},
    "export": {"errors", "chat", "qwen_model", "checkpoints", "loading"},
}
COMMANDS = ("finetune", "merge_lora", "scripts", "benchmarks")
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "processes": set(),
    "commands": {"errors", "processes"},
    **PACKAGES,
    **{command: {"errors", "processes", "commands", *PACKAGES} for command in COMMANDS},
}
OURS = {*MAY_IMPORT, "tests"}

# Besides the standard library.
LIBRARIES = {"errors": set(), "checkpoints": {"torch", "safetensors"}}


def sources_of(name: str) -> list[Path]:
    """Sources of a package, or of a module at the root. ``finetune`` is both a module and a folder of launchers."""
    module = REPO / f"{name}.py"
    return [*([module] if module.is_file() else []), *sorted((REPO / name).rglob("*.py"))]


ALL_SOURCES = [path for name in MAY_IMPORT for path in sources_of(name)]


def imported_modules(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and first name of every import, also of those within functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            yield node.lineno, (node.module or "").split(".")[0]
        elif isinstance(node, ast.Call) and dotted(node.func) in ("importlib.import_module", "import_module"):
            argument = node.args[0]
            assert isinstance(argument, ast.Constant), f"line {node.lineno}: what is imported must be readable here"
            yield node.lineno, str(argument.value).split(".")[0]


def dotted(node: ast.AST) -> str:
    """``torch.load`` of the expression that says so; an empty string for others."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def import_faults(name: str, tree: ast.AST) -> list[str]:
    faults = []
    for line, module in imported_modules(tree):
        if module in OURS and module != name and module not in MAY_IMPORT[name]:
            faults.append(f"{line}: {name} must not import {module}")
        outside = module not in OURS and module not in sys.stdlib_module_names
        if outside and name in LIBRARIES and module not in LIBRARIES[name]:
            faults.append(f"{line}: {name} must not import {module}")
    return faults


def call_faults(tree: ast.AST) -> list[str]:
    """Remote code, and files that run code when they are read. The error that ``torch.load`` raises may be named."""
    faults = []
    for line, module in imported_modules(tree):
        if module in ("_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"):
            faults.append(f"{line}: {module} runs code of the file it reads")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and dotted(node.value) == "pickle" and node.attr != "UnpicklingError":
            faults.append(f"{node.lineno}: pickle.{node.attr} runs code of the file it reads")
        elif isinstance(node, ast.ImportFrom) and node.module == "pickle":
            faults.append(f"{node.lineno}: name pickle.UnpicklingError, import nothing from pickle")
        elif isinstance(node, ast.Import) and any(name.name == "pickle" and name.asname for name in node.names):
            faults.append(f"{node.lineno}: pickle under another name")
        elif isinstance(node, ast.Call):
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            trusts = given.get("trust_remote_code")
            if trusts is not None and not (isinstance(trusts, ast.Constant) and trusts.value is False):
                faults.append(f"{node.lineno}: trust_remote_code")
            weights_only = given.get("weights_only")
            is_safe = isinstance(weights_only, ast.Constant) and weights_only.value is True
            if dotted(node.func) == "torch.load" and not is_safe:
                faults.append(f"{node.lineno}: torch.load without weights_only=True")
            if dotted(node.func) in ("eval", "exec"):
                faults.append(f"{node.lineno}: {dotted(node.func)}")
        elif isinstance(node, ast.Constant) and node.value == "trust_remote_code":
            faults.append(f"{node.lineno}: trust_remote_code")
    return faults


def test_every_package_is_in_the_rule() -> None:
    """A new package must be given its place before it can be imported."""
    packages = {path.parent.name for path in REPO.glob("*/__init__.py")}
    modules = {path.stem for path in REPO.glob("*.py")}
    assert packages | modules <= OURS
    assert {"qwen_model", "errors"} <= packages | modules
    # `import finetune` must find finetune.py, not the folder of the launchers.
    assert not (REPO / "finetune" / "__init__.py").exists()


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_imports_point_one_way(name: str) -> None:
    for path in sources_of(name):
        faults = import_faults(name, ast.parse(path.read_text(encoding="utf-8")))
        assert faults == [], path.relative_to(REPO)


def test_no_source_runs_foreign_code() -> None:
    assert len(ALL_SOURCES) > 10
    for path in ALL_SOURCES:
        assert call_faults(ast.parse(path.read_text(encoding="utf-8"))) == [], path.relative_to(REPO)


def test_no_launcher_asks_for_remote_code() -> None:
    for path in [*REPO.glob("finetune/*"), *REPO.glob("scripts/*.sh")]:
        assert "trust_remote_code" not in path.read_text(encoding="utf-8"), path.relative_to(REPO)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("qwen_model", "from data_utils.schema import Conversation"),
        ("qwen_model", "def f():\n    import training.config.args"),
        ("data_utils", "import training"),
        ("data_utils", "import checkpoints.fold"),
        ("training", "from finetune import main"),
        ("scripts", "import merge_lora"),
        ("checkpoints", "from qwen_model import rope"),
        ("checkpoints", "import transformers"),
        ("errors", "import torch"),
        ("errors", "import qwen_model"),
        ("export", "import training"),
        ("training", "from tests.golden import REPO"),
        ("training", "import quantize.gptq"),
    ],
)
def test_the_import_rule_can_be_broken(name: str, source: str) -> None:
    assert len(import_faults(name, ast.parse(source))) == 1


def test_allowed_imports_are_no_faults() -> None:
    source = "import json\nimport torch\nfrom safetensors import safe_open\nfrom errors import ConfigError\n"
    assert import_faults("checkpoints", ast.parse(source + "from checkpoints.shards import read")) == []
    assert (
        import_faults("scripts", ast.parse("import training.config.args\nimport checkpoints.fold\nimport peft")) == []
    )


@pytest.mark.parametrize(
    "source",
    [
        "f(trust_remote_code=True)",
        "f(trust_remote_code=args.trust)",
        "f(**{'trust_remote_code': True})",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "import pickle\npickle.loads(data)",
        "import pickle as p",
        "from pickle import loads",
        "import joblib",
        "exec(text)",
    ],
)
def test_foreign_code_is_found(source: str) -> None:
    assert len(call_faults(ast.parse(source))) == 1


def test_safe_calls_are_no_faults() -> None:
    source = "import pickle\ntry:\n    torch.load(path, weights_only=True)\nexcept pickle.UnpicklingError:\n    pass\n"
    source += "model.eval()\nf(trust_remote_code=False)\n"
    assert call_faults(ast.parse(source)) == []
