"""``scripts.evaluate`` on a model that can think: prompts that are asked for, answers that begin in the prompt."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evaluation.evaluating import Opened, Sets, Subject
from evaluation.prompt_flags import Prompts
from scripts.evaluate import main
from tests.commands import run_here
from tests.models import write_later_checkpoint

THOUGHT = "<think>\nSix sevens.\n</think>\n\nIt is 42."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Path:
    """A folder with a tiny Qwen3.6, and a question that is answered with thinking and without."""
    folder = tmp_path_factory.mktemp("prompts")
    template = (shared / "families" / "templates" / "qwen3_6.jinja").read_text(encoding="utf-8")
    write_later_checkpoint(folder / "model", "qwen3_5_text", template)
    answers: list[dict[str, Any]] = [{"content": "It is 42.", "reasoning_content": "Six sevens."}, {"content": "42"}]
    question = {"role": "user", "content": "6 x 7?"}
    records = [{"messages": [question, {"role": "assistant", **answer}]} for answer in answers]
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_each_answer_is_behind_its_own_prompt_and_shown_whole(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two models read the file, which is logged once."""
    output, model = tmp_path / "out", ("--model_name_or_path", folder / "model")
    command = [*model, "--data_path", folder / "data.jsonl", "--output", output, "--no_general", "--max_new_tokens", 2]
    assert run_here(main, "scripts.evaluate", [*command, "--against", folder / "model"]) == 0
    rows = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()[1:3]]
    assert [row["expected"] for row in rows] == [THOUGHT, "42"]
    assert [row["answer"].startswith("<think>\n") for row in rows] == [True, False]
    assert "&lt;think&gt;" in (output / "report.html").read_text(encoding="utf-8")
    assert capfd.readouterr().err.count("read as") == 1
    assert run_here(main, "scripts.evaluate", [*command, "--thinking", "off"]) == 2
    assert "answers.jsonl was written with other thinking, models" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("prompts", "opening", "expected"),
    [
        (Prompts("on"), "<think>\n", (THOUGHT, "<think>\n\n</think>\n\n42")),
        (Prompts("off"), "<think>\n\n</think>\n\n", ("It is 42.", "42")),
        (Prompts("off", chat_template="qwen2_5.jinja"), "", ("It is 42.", "42")),
    ],
    ids=["on", "off", "template"],
)
def test_flags_choose_the_prompts(
    folder: Path, shared: Path, prompts: Prompts, opening: str, expected: tuple[str, str]
) -> None:
    if prompts.chat_template:
        prompts = replace(prompts, chat_template=str(shared / "families" / "templates" / prompts.chat_template))
    sets = Sets(Opened(Subject("base", str(folder / "model"), prompts=prompts)), 8)
    sets.read("held_out", [str(folder / "data.jsonl")], "auto", None, seed=1)
    answerer, questions = sets.answerer, sets.questions["held_out"]
    assert [question.opening for question in questions] == [opening, opening]
    assert tuple(answerer.shown(each, answerer.text(each.expected_ids)) for each in questions) == expected
