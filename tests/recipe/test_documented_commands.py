"""Every command in README.md, CONTRIBUTING.md and docs/ runs here on a tiny model, or is listed below.

What is listed has the test that runs it, or the reason why it is not run. Those of other documents than README.md take
minutes and are marked long.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import fork_server
from tests.commands import TIMEOUT, environment
from tests.documents import DOCUMENTS, Command, broken_links, commands_in
from tests.golden import REPO, SMALL
from tests.quantized import write_gptq

TINY = SMALL / "tiny-qwen-small"

# Commands, by their start, that another test runs or that cannot run here.
ELSEWHERE = {
    "bash scripts/quickstart.sh": "tests/recipe/test_identity.py",
    "python -m scripts.make_small_qwen": "tests/nightly/test_readme_example.py",
    "sh finetune/finetune_lora_single_gpu.sh -m build/small": "tests/nightly/test_readme_example.py",
    "python merge_lora.py --adapter output/small": "tests/nightly/test_readme_example.py",
    "python -m scripts.ask --model_name_or_path output/small": "tests/nightly/test_readme_example.py",
    "sh finetune/finetune_ds.sh": "tests/recipe/test_launchers.py",
    "sh finetune/finetune_fsdp.sh": "tests/recipe/test_launchers.py",
    "sh finetune/finetune_lora_ds.sh": "tests/recipe/test_launchers.py",
    "sh finetune/finetune_qlora_ds.sh": "tests/recipe/test_launchers.py",
    "NNODES=": "tests/recipe/test_hosts.py",
    "torchrun": "tests/recipe/test_processes.py",
    "mpirun": "tests/recipe/test_processes.py",
    "python -m scripts.chat": "tests/unit/serving/terminal/test_chat.py",
    "python -m scripts.evaluate": "tests/unit/scripts/test_evaluate.py",
    "python -m scripts.export_gguf": "tests/recipe/test_export_gguf.py",
    "python -m scripts.generate": "tests/unit/scripts/test_generate.py",
    "python -m scripts.serve": "tests/unit/scripts/test_serve.py",
    "python -m scripts.recipes": "tests/unit/scripts/test_recipes.py",
    "python finetune.py --config recipes": "tests/unit/scripts/test_recipes.py",
    "python -m tests.fuzz_requests": "tests/unit/serving/api/test_clients.py",
    "python -m tests.fuzz_data": "tests/unit/data_utils/test_fuzz_data.py",
}
# Documents whose commands are those of others with other names. tests/unit/test_migrating.py parses them, as the
# programs themselves do.
PARSED = ("docs/faq.md", "docs/migrating.md")
NOT_RUN = {
    "bash scripts/test.sh": "runs this test",
    "bash .ci/run": "runs this test",
    "HYPOTHESIS_PROFILE=nightly": "takes an hour",
    "python -m benchmarks": "measures for minutes",
    "pip install": "changes the environment",
    "python -m venv .venv-vllm": "downloads gigabytes",
    ".venv-vllm/bin/": "needs vLLM; benchmarks/vllm.py starts it with these flags",
    "VLLM_CPU_KVCACHE_SPACE=": "needs vLLM; benchmarks/vllm.py starts it so",
    "python -m sglang": "SGLang was not tried",
    "source .venv/bin/activate && pip install": "changes the environment",
    "deepspeed": "needs other hosts; tests/unit/training/distributed/test_launch.py tests its variables",
    "accelerate launch": "needs other hosts; tests/unit/training/distributed/test_launch.py tests its variables",
    "export": "part of the command that follows",
    "srun": "needs Slurm; its variables are tested in tests/unit/training/distributed/test_launch.py",
    "sbatch": "needs Slurm; tests/unit/test_cluster_files.py checks the file",
    "kubectl": "needs Kubernetes; tests/unit/test_cluster_files.py checks the file",
}


ALL = [command for document in DOCUMENTS for command in commands_in(document)]


def listed(command: Command, table: dict[str, str]) -> str | None:
    """The entry of a table whose key the command starts with."""
    text = command.text.removeprefix(".venv/bin/")
    return next((value for key, value in table.items() if text.startswith(key)), None)


def in_time(command: Command) -> Any:
    """Mark a command as long if it is not one of README.md."""
    return pytest.param(command, marks=[pytest.mark.long] if command.document != "README.md" else [])


def is_form(command: Command) -> bool:
    """Return whether the command contains a placeholder, so that it cannot run as it is."""
    return re.search(r"\.\.\.|\b(NAME|RUN|DIR|FILE|BASE|MODEL|DATA|IN|OUT)\b", command.text) is not None


TO_RUN = [
    command
    for command in ALL
    if not (listed(command, ELSEWHERE) or listed(command, NOT_RUN) or is_form(command) or command.document in PARSED)
]


@pytest.fixture(scope="module")
def workspaces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """A folder per document in which its commands run one after the other, as in a checkout."""
    made: dict[str, Path] = {}

    def workspace(document: str) -> Path:
        if document not in made:
            made[document] = tmp_path_factory.mktemp("workspace")
            prepare(made[document], document, made.get("README.md"))
        return made[document]

    yield workspace


def prepare(folder: Path, document: str, readme: Path | None) -> None:
    """Fill a workspace: the repository's files, the environment, data, models, and results of README's commands."""
    fork_server.link_checkout(folder, ["docs"])
    (folder / "docs").mkdir()
    records = json.loads((REPO / "examples" / "identity.json").read_text(encoding="utf-8"))[:8]
    for name in ("conversations.json", "train.json", "held_out.json"):
        (folder / name).write_text(json.dumps(records), encoding="utf-8")
    (folder / "conversations.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    text = (REPO / document).read_text(encoding="utf-8")
    for block in re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL):
        (folder / "run.yaml").write_text(placed(block, folder), encoding="utf-8")
    if "Int4" in text:
        write_gptq(TINY, folder / "int4")
    made_here = set(re.findall(r"(?:-o|--output|--output_dir|output_dir:) +(\S+)", text))
    results = {"adapter": "adapter", "polite": "adapter", "terse": "adapter", "merged": "merged"}
    for name, result in results.items():
        if readme is not None and f"output/{name}" in text and f"output/{name}" not in made_here:
            shutil.copytree(readme / "output" / result, folder / "output" / name)


def placed(text: str, folder: Path) -> str:
    """Return a text with models replaced by tiny ones, whose layers have 32 inputs."""
    text = text.replace("/path/to/Qwen-7B-Chat-Int4", str(folder / "int4")).replace("/path/to/Qwen-7B-Chat", str(TINY))
    return text.replace("--group_size 128", "--group_size 32")


def test_documents_contain_commands() -> None:
    assert {command.document for command in ALL} >= {"README.md", "CONTRIBUTING.md", "docs/data.md"}
    assert len(TO_RUN) >= 12


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links_lead_to_files_and_headings(document: Path) -> None:
    assert broken_links(document) == []


@pytest.mark.parametrize("key", ELSEWHERE)
def test_commands_tested_elsewhere_are_tested_there(key: str) -> None:
    program = key.removesuffix("=").split("/")[-1].split()[-1]
    assert program in (REPO / ELSEWHERE[key]).read_text(encoding="utf-8")


@pytest.mark.parametrize("command", [command for command in ALL if is_form(command)], ids=lambda command: command.place)
def test_forms_name_what_exists(command: Command) -> None:
    for module in re.findall(r"-m ((?:scripts|benchmarks|tests)\.\w+)", command.text):
        path = REPO / module.replace(".", "/")
        assert module.endswith(".NAME") or path.with_suffix(".py").is_file() or path.is_dir(), command.text
    for file in re.findall(r"[\w./-]+\.(?:py|sh)\b", command.text):
        assert (REPO / file).is_file() or (REPO / "finetune" / file).is_file(), command.text


@pytest.mark.parametrize("command", [in_time(command) for command in TO_RUN], ids=lambda command: command.place)
def test_a_documented_command_runs(command: Command, workspaces: Callable[[str], Path]) -> None:
    """In the order of the documents: a command may need the results of the ones before it."""
    folder = workspaces(command.document)
    result = subprocess.run(
        ["bash", "-c", placed(command.text, folder)],
        cwd=folder, env=environment() | {"PATH": f"{folder}/.venv/bin{os.pathsep}{os.environ['PATH']}"},
        capture_output=True, text=True, timeout=TIMEOUT, check=False,
    )  # fmt: skip
    assert result.returncode == 0, f"{command.text}\n{result.stderr}"
