"""Figures of ``scripts.evaluate --tasks`` equal those of lm_eval's own model for the same checkpoint and questions.

lm_eval and what it needs beyond this environment (350 MB) are installed into an environment of their own, which also
sees the packages of this one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.golden import REPO, offline_environment
from tests.models import TINY, write_later_checkpoint
from tests.unit.test_offline import NO_NETWORK

BENCHMARKS = REPO / "tests" / "references" / "benchmarks"
TASKS = "ceval,cmmlu,mmlu,gsm8k,humaneval"
# Runs lm_eval's model on the tasks that the command gave to it, and writes both models' requests and figures.
COMPARED = """
import json, sys
from pathlib import Path
from types import SimpleNamespace

from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from evaluation.task_flags import read_items
from evaluation.task_harness import build_task, digest_of
from evaluation.task_prompts import is_right_number

model, data, output = sys.argv[1:]
args = SimpleNamespace(tasks="ceval,cmmlu,mmlu,gsm8k", data_dir=Path(data), num_fewshot=None, limit=None, seed=42,
                       apply_chat_template=False)
tokenizer = AutoTokenizer.from_pretrained(model)
loaded = AutoModelForCausalLM.from_pretrained(model)
lm = HFLM(pretrained=loaded, tokenizer=tokenizer, batch_size=4, add_bos_token=False)
type(lm).max_gen_toks = property(lambda self: 16)
answers, figures = {}, {}
for name, items in read_items(args).items():
    task = build_task(name, items, lambda item, answer: is_right_number(answer, item.expected))
    results = evaluate(lm=lm, task_dict={name: task}, bootstrap_iters=0, log_samples=True)
    figures[name] = results["results"][name]["acc,none"]
    for instance in task.instances:
        answers[digest_of(instance.args)] = instance.resps[0]
Path(output).write_text(json.dumps([figures, answers]))
"""


@pytest.fixture(scope="module")
def python() -> Path:
    """The Python of an environment with lm_eval."""
    folder = REPO / ".venv-evaluate"
    python = folder / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    here, [packages] = sysconfig.get_path("purelib"), (folder / "lib").glob("python*/site-packages")
    (packages / "other.pth").write_text(f"{here}\n")
    command = [python, "-m", "pip", "install", "--quiet", "-r", "requirements_evaluate.txt", "-c", "constraints.txt"]
    if subprocess.run(command, cwd=REPO).returncode != 0:
        message = "NOT TESTED with lm_eval: pip cannot install it"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    return python


def run(python: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python in the repository; an attempt to use the network is its exit code 77."""
    environment = {key: value for key, value in offline_environment().items() if not key.endswith("_OFFLINE")}
    return subprocess.run(
        [python, *map(str, arguments)], cwd=REPO, env=environment, capture_output=True, text=True, check=False
    )


def command(model: Path, output: Path, tasks: str, *flags: object) -> list[object]:
    source = f"{NO_NETWORK}\nimport sys\nfrom scripts.evaluate import main\nsys.exit(main(sys.argv[1:]))"
    return [
        "-c", source, "--model_name_or_path", model, "--tasks", tasks, "--data_dir", BENCHMARKS, "--output", output,
        "--max_new_tokens", 16, *flags,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_later_checkpoint(tmp_path_factory.mktemp("model") / "qwen2", "qwen2", positions=2048)


def test_figures_are_those_of_the_harness_with_its_own_model(python: Path, model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    tasks = TASKS.removesuffix(",humaneval")
    ours = run(python, *command(model, output, tasks))
    assert ours.returncode == 0, ours.stdout + ours.stderr
    theirs = run(python, "-c", COMPARED, model, BENCHMARKS, tmp_path / "theirs.json")
    assert theirs.returncode == 0, theirs.stderr
    figures, answers = json.loads((tmp_path / "theirs.json").read_text())
    report = json.loads((output / "report.json").read_text())
    rows = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()[1:]]
    assert {row["where"] for row in rows} == set(answers) and len(rows) == 4 * (4 + 2 + 5) + 2
    for row in rows:
        expected = answers[row["where"]]
        if isinstance(expected, str):
            assert row["result"] == expected
        else:
            assert row["result"] == [pytest.approx(expected[0], abs=1e-3), expected[1]]
    for name in tasks.split(","):
        subjects = report["sets"][name]["subjects"]["base"].values()
        questions = sum(each["questions"] for each in subjects)
        mean = sum(each["value"] * each["questions"] for each in subjects) / questions
        assert mean == pytest.approx(figures[name])
    # The published mean of C-Eval is that of its subjects.
    of_ceval = report["sets"]["ceval"]
    by_subject = [each["value"] for each in of_ceval["subjects"]["base"].values()]
    assert of_ceval["figures"]["base"]["accuracy"]["value"] == pytest.approx(sum(by_subject) / 2)


def test_a_killed_run_continues_and_chats_are_asked(python: Path, tmp_path: Path) -> None:
    """With Qwen v1, all benchmarks, a chat format, and programs that are run; nothing reaches the network."""
    flags = ("--num_fewshot", 0, "--allow_code_execution", "--apply_chat_template")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert (result := run(python, *command(TINY, whole, TASKS, *flags))).returncode == 0, result.stderr
    report = json.loads((whole / "report.json").read_text())
    assert list(report["sets"]) == TASKS.split(",")
    assert report["sets"]["humaneval"]["figures"]["base"]["pass@1"] == {"value": 0, "low": 0, "high": 0, "count": 2}
    cut.mkdir()
    lines = (whole / "answers.jsonl").read_text().splitlines(keepends=True)
    (cut / "answers.jsonl").write_text("".join(lines[:9]) + lines[9][:20])
    assert (result := run(python, *command(TINY, cut, TASKS, *flags))).returncode == 0, result.stderr
    assert (cut / "report.json").read_bytes() == (whole / "report.json").read_bytes()
    assert sorted((cut / "answers.jsonl").read_text().splitlines()) == sorted(line[:-1] for line in lines)
    result = run(python, *command(TINY, cut, TASKS, *flags, "--limit", 1))
    assert result.returncode != 0 and "was written with other limit, data" in result.stderr
