"""``scripts.evaluate`` on benchmarks and on tool use: figures of a model that was taught, and a line for each fault."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from scripts.evaluate import main
from tests.commands import finetune_here, read_json, restored_log_handlers, run_here
from tests.golden import REPO
from tests.models import TINY, copy_checkpoint

BENCHMARKS = REPO / "tests" / "references" / "benchmarks"
TOOLS = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("sky", "sea")]


def question(text: str, name: str | None) -> dict[str, object]:
    """Return a record that is answered by a call of a function, or by a greeting."""
    call = {"id": "1", "type": "function", "function": {"name": name, "arguments": '{"at": 7}'}}
    answer = {"role": "assistant", "content": "Hello."} if name is None else {"role": "assistant", "tool_calls": [call]}
    return {"tools": TOOLS, "messages": [{"role": "user", "content": text}, answer]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a question that needs a tool and one that does not, and an adapter that was trained on them."""
    folder = tmp_path_factory.mktemp("questions")
    # Of one rotary base: training has no dynamic NTK, and the tools take more tokens than the model was trained with.
    base = copy_checkpoint(folder / "base", use_dynamic_ntk=False, use_logn_attn=False)
    records = [question("Blue?", "sky"), question("Hi", None)]
    (folder / "tools.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    finetune_here(
        "--model_name_or_path", base, "--data_path", folder / "tools.jsonl", "--output_dir", folder / "adapter",
        "--use_lora", "--num_train_epochs", 40, "--learning_rate", 0.02, "--lora_dropout", 0, "--lora_r", 32,
        "--lora_alpha", 32,
    )  # fmt: skip
    return folder


def evaluate(*flags: object) -> int:
    with restored_log_handlers():
        return main([str(each) for each in flags])


def test_tool_use_of_a_taught_adapter_is_right(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = folder / "base"
    flags = (
        "--model_name_or_path",
        base,
        "--adapter",
        folder / "adapter",
        "--tool_use",
        folder / "tools.jsonl",
        "--output",
        tmp_path / "out",
    )
    assert evaluate(*flags, "--max_new_tokens", 120) == 0
    figures = read_json(tmp_path / "out" / "report.json")["sets"]["tool_use"]["figures"]
    names = ("tool_selection", "tool_input", "false_positive")
    assert [figures["adapter"][name]["value"] for name in names] == [1, 1, 0]
    assert [figures["adapter"][name]["count"] for name in names] == [1, 1, 1]
    assert figures["base"]["tool_selection"]["value"] == 0
    assert "tool_use: 2 questions\n" in capsys.readouterr().out
    assert "tool_selection" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")

    monkeypatch.setattr("evaluation.evaluating.load_for_inference", None)  # nothing is missing, so nothing is loaded
    assert evaluate(*flags, "--max_new_tokens", 120) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "give one of --data_path, --tasks, --tool_use, --perplexity"),
        (("--tasks", "mmlu", "--tool_use", "x"), "give one of --data_path, --tasks, --tool_use, --perplexity"),
        (("--tool_use", "{tools}", "--num_fewshot", 2), "--num_fewshot has no effect without --tasks"),
        (
            ("--tasks", "mmlu,bbh", "--data_dir", "{benchmarks}"),
            "'bbh' is unknown. Give some of ceval,cmmlu,mmlu,gsm8k",
        ),
        (("--tasks", "", "--data_dir", "{benchmarks}"), "--tasks '' names nothing"),
        (("--tasks", "mmlu"), "--tasks mmlu needs --data_dir"),
        (("--tasks", "mmlu", "--data_dir", "/none"), "--data_dir /none: there is no folder mmlu"),
        (("--tasks", "mmlu", "--data_dir", "{benchmarks}", "--num_fewshot", 6), "mmlu has 5 examples of common_things"),
        (("--tasks", "humaneval", "--data_dir", "{benchmarks}"), "Allow it with --allow_code_execution"),
        (("--tool_use", "{plain}"), "has no question for which tools are offered"),
        (("--tool_use", "/none.jsonl"), "/none.jsonl"),
        (("--tool_use", "{tools}", "--adapter", "{plain}"), "--adapter"),
    ],
)
def test_a_fault_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[object, ...], message: str
) -> None:
    plain = tmp_path / "plain.json"
    plain.write_text('[{"messages": [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]}]')
    names = {"tools": folder / "tools.jsonl", "plain": plain, "benchmarks": BENCHMARKS}
    command = ["--model_name_or_path", TINY, "--output", tmp_path / "out"]
    code = run_here(main, "scripts.evaluate", [*command, *(str(each).format(**names) for each in flags)])
    error = capsys.readouterr().err
    assert code == 2 and message in error and "Traceback" not in error, error
    assert not (tmp_path / "out").exists()


def test_lm_eval_is_asked_for_behind_faults_of_the_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evaluation.task_flags.importlib.util.find_spec", lambda name: None)
    shutil.copytree(BENCHMARKS, tmp_path / "data")
    command = [
        "--model_name_or_path",
        TINY,
        "--tasks",
        "gsm8k",
        "--data_dir",
        tmp_path / "data",
        "--output",
        tmp_path / "o",
    ]
    assert run_here(main, "scripts.evaluate", [str(each) for each in command]) == 2
    assert "--tasks needs lm_eval, which is not installed. Install it: " in capsys.readouterr().err
    (tmp_path / "data" / "gsm8k" / "test.jsonl").write_text("")
    assert run_here(main, "scripts.evaluate", [str(each) for each in command]) == 2
    assert "test.jsonl: contains no questions" in capsys.readouterr().err
