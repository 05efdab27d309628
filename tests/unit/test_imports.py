"""Rules for sources, checked without running them: import direction, circles, launcher variables, remote code, size."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.golden import REPO

# Imports point one way. Commands may import every package, and nothing imports a command.
PACKAGES = {
    "chat": {"errors"},
    "qwen_model": {"errors", "chat"},
    "data_utils": {"errors", "console", "outputs", "chat"},
    "checkpoints": {"errors", "console", "ownership", "outputs", "qwen_model"},
    "loading": {"errors", "console", "processes", "chat", "qwen_model", "checkpoints"},
    "training": {
        "errors", "console", "ownership", "outputs", "processes", "commands", "chat", "qwen_model", "data_utils",
        "checkpoints", "loading", "evaluation",
    },
    "quantize": {
        "errors", "console", "outputs", "processes", "chat", "qwen_model", "data_utils", "checkpoints", "loading",
    },
    "export": {"errors", "console", "outputs", "processes", "chat", "qwen_model", "checkpoints", "loading"},
    "planning": {
        "errors", "console", "outputs", "processes", "chat", "qwen_model", "data_utils", "checkpoints", "loading",
        "training", "evaluation",
    },
    "serving": {"errors", "console", "processes", "chat", "qwen_model", "checkpoints", "loading"},
    "evaluation": {
        "errors", "console", "outputs", "chat", "qwen_model", "checkpoints", "data_utils", "loading", "serving",
    },
}  # fmt: skip
COMMANDS = ("finetune", "merge_lora", "scripts", "benchmarks")
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "console": set(),
    "ownership": {"errors"},
    "outputs": {"errors", "ownership"},
    "processes": {"errors"},
    "commands": {"errors", "console", "processes"},
    "qwen_generation_utils": {"qwen_model"},  # the original's name of a module of qwen_model
    **PACKAGES,
    **{command: {"errors", "console", "outputs", "processes", "commands", *PACKAGES} for command in COMMANDS},
}
OURS = {*MAY_IMPORT, "tests"}

# Modules of a package that another package may import, if not all of them.
ONLY_MODULES = {("checkpoints", "qwen_model"): {"qwen_model.architectures"}}

# Libraries that a package may import beside the standard library, if not all of them.
LIBRARIES: dict[str, set[str]] = {
    "errors": set(),
    "console": set(),
    "ownership": set(),
    "outputs": set(),
    "processes": {"torch"},
    "commands": set(),
    "checkpoints": {"torch", "safetensors"},
}

# Variables that only processes.py may read or set.
LAUNCHER_VARIABLES = {
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "MASTER_ADDR",
    "MASTER_PORT",
}  # fmt: skip


def sources_of(name: str) -> list[Path]:
    """Sources of a package, or of a module at the root. ``finetune`` is both a module and a folder of launchers."""
    module = REPO / f"{name}.py"
    return [*([module] if module.is_file() else []), *sorted((REPO / name).rglob("*.py"))]


ALL_SOURCES = [path for name in MAY_IMPORT for path in sources_of(name)]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path: Path) -> str:
    parts = path.relative_to(REPO).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path) for path in ALL_SOURCES}


def imported_modules(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import, including those in functions and under ``TYPE_CHECKING``.

    ``from a import b`` is ``a.b`` if that is a module of the project, else ``a``.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"line {node.lineno}: imports must be absolute"
            for module in {f"{node.module}.{alias.name}" for alias in node.names}:
                yield node.lineno, module if module in MODULES else node.module
        elif isinstance(node, ast.Call) and dotted(node.func) in ("importlib.import_module", "import_module"):
            argument = node.args[0]
            assert isinstance(argument, ast.Constant), f"line {node.lineno}: the imported module must be a literal"
            yield node.lineno, str(argument.value)


def dotted(node: ast.AST) -> str:
    """Return the source of a name such as ``torch.load``; empty for any other expression."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def import_faults(name: str, tree: ast.AST) -> list[str]:
    """Imports of a source of package ``name`` that the rules forbid."""
    faults = []
    for line, module in sorted(set(imported_modules(tree))):
        package = module.split(".")[0]
        if package in OURS:
            only = ONLY_MODULES.get((name, package), {module})
            is_allowed = package == name or (package in MAY_IMPORT[name] and module in only)
        else:
            is_allowed = package in sys.stdlib_module_names or package in LIBRARIES.get(name, {package})
        if not is_allowed:
            faults.append(f"{line}: {name} must not import {module}")
    return faults


def variable_faults(tree: ast.AST) -> list[str]:
    """Names of launcher variables in a source other than ``processes.py``."""
    return [
        f"{node.lineno}: {node.value} belongs to processes.py"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and (node.value in LAUNCHER_VARIABLES or node.value.startswith("TORCHELASTIC_"))
    ]


def find_circle(imports: Mapping[str, set[str]]) -> list[str]:
    """Return the modules of an import circle, the first one again at the end; empty if there is none."""
    finished: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module not in finished:
            for imported in sorted(imports.get(module, ())):
                if circle := visit(imported, [*path, module]):
                    return circle
            finished.add(module)
        return []

    return next((circle for module in sorted(imports) if (circle := visit(module, []))), [])


def call_faults(tree: ast.AST) -> list[str]:
    """Calls that run code from files or checkpoints. The exception that ``torch.load`` raises may be named."""
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
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            trusts = keywords.get("trust_remote_code")
            if trusts is not None and not (isinstance(trusts, ast.Constant) and trusts.value is False):
                faults.append(f"{node.lineno}: trust_remote_code")
            weights_only = keywords.get("weights_only")
            is_safe = isinstance(weights_only, ast.Constant) and weights_only.value is True
            if dotted(node.func) == "torch.load" and not is_safe:
                faults.append(f"{node.lineno}: torch.load without weights_only=True")
            if dotted(node.func) in ("eval", "exec"):
                faults.append(f"{node.lineno}: {dotted(node.func)}")
        elif isinstance(node, ast.Constant) and node.value == "trust_remote_code":
            faults.append(f"{node.lineno}: trust_remote_code")
    return faults


# ---------------------------------------------------------------------------------------------------- the project


def test_every_package_is_in_the_rule() -> None:
    packages = {path.parent.name for path in REPO.glob("*/__init__.py")}
    modules = {path.stem for path in REPO.glob("*.py")}
    assert packages | modules <= OURS
    assert {"qwen_model", "errors"} <= packages | modules
    # `import finetune` must find finetune.py, not the folder of the launchers.
    assert not (REPO / "finetune" / "__init__.py").exists()


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_imports_point_one_way(name: str) -> None:
    for path in sources_of(name):
        assert import_faults(name, parse(path)) == [], path.relative_to(REPO)


def test_no_import_circle() -> None:
    """Imports in functions and under ``TYPE_CHECKING`` count: a circle cannot be hidden there."""
    imports = {
        module_name(path): {module for _, module in imported_modules(parse(path)) if module in MODULES}
        for path in ALL_SOURCES
    }
    assert len(imports) > 100 and any(imports.values())
    assert " -> ".join(find_circle(imports)) == ""


def test_only_processes_reads_launcher_variables() -> None:
    assert variable_faults(parse(REPO / "processes.py")) != []
    for path in ALL_SOURCES:
        if path != REPO / "processes.py":
            assert variable_faults(parse(path)) == [], path.relative_to(REPO)


def test_no_source_runs_foreign_code() -> None:
    assert len(ALL_SOURCES) > 10
    for path in ALL_SOURCES:
        assert call_faults(parse(path)) == [], path.relative_to(REPO)


def test_no_launcher_enables_remote_code() -> None:
    for path in [*REPO.glob("finetune/*"), *REPO.glob("scripts/*.sh")]:
        assert "trust_remote_code" not in path.read_text(encoding="utf-8"), path.relative_to(REPO)


# ------------------------------------------------------------------------------------------------------ the rules


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("qwen_model", "from data_utils.schema import Conversation"),
        ("qwen_model", "def f():\n    import training.config.args"),
        ("qwen_model", "if TYPE_CHECKING:\n    from loading.checkpoint import Checkpoint"),
        ("qwen_model", "import importlib\nimportlib.import_module('training.trainer')"),
        ("data_utils", "import training"),
        ("data_utils", "import checkpoints.fold"),
        ("training", "from finetune import main"),
        ("scripts", "import merge_lora"),
        ("checkpoints", "from qwen_model import rope"),
        ("checkpoints", "from qwen_model.rope import rotary_tables"),
        ("checkpoints", "import transformers"),
        ("errors", "import torch"),
        ("errors", "import qwen_model"),
        ("export", "import training"),
        ("training", "from tests.golden import REPO"),
        ("training", "import quantize.gptq"),
        ("serving", "import data_utils.schema"),
        ("serving", "import evaluation.metrics"),
        ("evaluation", "import training.progress"),
        ("loading", "from serving.engine import Engine"),
    ],
)
def test_forbidden_import_is_found(name: str, source: str) -> None:
    assert len(import_faults(name, ast.parse(source))) == 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("checkpoints", "import json\nimport torch\nfrom safetensors import safe_open\nfrom errors import ConfigError"),
        ("checkpoints", "from checkpoints.shards import read\nfrom qwen_model.architectures import ARCHITECTURES"),
        ("checkpoints", "from qwen_model import architectures"),
        ("scripts", "import training.config.args\nimport checkpoints.fold\nimport peft"),
    ],
)
def test_allowed_import_is_no_fault(name: str, source: str) -> None:
    assert import_faults(name, ast.parse(source)) == []


@pytest.mark.parametrize("source", ["os.environ['RANK']", "os.getenv('TORCHELASTIC_RUN_ID')", "x = ('MASTER_ADDR',)"])
def test_launcher_variable_is_found(source: str) -> None:
    assert len(variable_faults(ast.parse(source))) == 1
    assert variable_faults(ast.parse("os.environ['RANKS'], f'Set MASTER_ADDR', 'MY_RANK'")) == []


def test_circle_is_found_with_its_path() -> None:
    imports = {"a": {"b", "d"}, "b": {"c"}, "c": {"d", "b"}, "d": set()}
    assert find_circle(imports) == ["b", "c", "b"]
    assert find_circle(imports | {"c": {"d"}}) == []
    assert find_circle({"a": {"a"}}) == ["a", "a"]


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


def test_safe_call_is_no_fault() -> None:
    source = "import pickle\ntry:\n    torch.load(path, weights_only=True)\nexcept pickle.UnpicklingError:\n    pass\n"
    source += "model.eval()\nf(trust_remote_code=False)\n"
    assert call_faults(ast.parse(source)) == []
